"""Engines turn micro-batches into updated weights: our own schedules and optimizers, or one that owns both (DeepSpeed).

A training step has two halves, `backward` and `update`; between them each weight holds its gradient over the global batch. The trainer, the
layout tests and the benchmarks all run these two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.comm.mesh import Mesh
from megascale.comm.piece import Piece
from megascale.data.loader import Batch
from megascale.optim.clip import clip_factor, global_norm
from megascale.optim.optimizer import Optimizer
from megascale.optim.spikes import SpikeGate
from megascale.parallel.expert import settle_routers
from megascale.parallel.model import ParallelModel
from megascale.schedule.accumulate import Schedule
from megascale.train.state import state_pieces

Passes = Callable[[Tensor], Tensor]  # from a gradient norm to whether the step changes the weights, both on the device


class Engine(Protocol):
    """The functions `backward` and `update` below build a training step from it."""

    model: ParallelModel

    def run(self, batches: Sequence[Batch], scale: float, lr: float) -> Tensor:
        """Forward and backward of a step, as `Schedule.run`; `lr` is the learning rate of the step."""

    def update(self, valid: Tensor, passes: Passes = torch.isfinite) -> tuple[Tensor, Tensor]:
        """Divides gradients by `valid`, clips, steps. Returns the norm before clipping and whether it `passes`; if not, nothing moves."""

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """As `Schedule.evaluate`."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's, as `Optimizer.state`."""

    def pieces(self) -> dict[str, Piece]:
        """The state that a resume needs, to save or to load into. Collective."""

    def loaded(self, pieces: dict[str, Piece]) -> None:
        """Call after loading into `pieces`: copies them in unless they are the live state itself. Collective."""


class Sums(NamedTuple):
    """Sums over all ranks, 0-dim, fp64, on the device: loss and number of valid targets of the global batch, both times `scale`, and the
    number of ranks that ask to stop.
    """

    loss: Tensor
    valid: Tensor
    stop: Tensor


class Outcome(NamedTuple):
    """Result of a step, 0-dim, on the device: loss per valid target, gradient norm before clipping, and whether the weights changed: they
    do not if the norm is not finite, or a spike.
    """

    loss: Tensor
    norm: Tensor
    moved: Tensor


def backward(engine: Engine, batches: Sequence[Batch], scale: float, lr: float, stop: Callable[[], bool] = lambda: False) -> Sums:
    """The first half of a step: each weight gets its gradient over the global batch, times `scale`.

    stop  called after the last micro-batch: whether this rank asks all ranks to stop
    """
    loss = engine.run(batches, scale, lr)
    # Loss and gradients carry a fixed scale; the number of valid targets needs a sum over all ranks.
    return total_over_ranks(engine.model.mesh, loss, sum(b.valid for b in batches) * scale, float(stop()))


def update(engine: Engine, sums: Sums, gate: SpikeGate | None = None) -> Outcome:
    """The second half: divides the gradients by the number of valid targets, clips and applies them.

    Without a valid target this is 0 ÷ 0, so not finite, and no weight changes.
    """
    loss = sums.loss / sums.valid
    norm, moved = engine.update(sums.valid) if gate is None else engine.update(sums.valid, partial(gate.passes, loss))
    return Outcome(loss, norm, moved)


def total_over_ranks(mesh: Mesh, loss: Tensor, valid: float, stop: float = 0.0) -> Sums:
    """Three numbers summed over the ranks in one message; ranks with the same data count once."""
    # All stages and all cp ranks know the whole batch. Losses add up: each rank has that of its own positions, only at the head.
    counted, share = valid if mesh.tells_batch else 0.0, float(mesh.tells_loss)
    # Filled by kernels: a copy from the host would wait for the whole backward.
    own = (torch.full((), number, dtype=torch.float64, device=loss.device) for number in (counted, stop))
    numbers = torch.stack([loss.to(torch.float64) * share, *own])
    if mesh.size > 1:
        dist.all_reduce(numbers)
    return Sums(*numbers.unbind())


@dataclass
class Native:
    """Our own schedule and optimizer over the weights of `model`. `clip`: the largest gradient norm; 0 never clips."""

    model: ParallelModel
    schedule: Schedule
    optimizer: Optimizer
    clip: float
    lr: float = 0.0
    factors: Mapping[str, float] = field(default_factory=dict)  # weight → factor in the gradient norm

    def run(self, batches: Sequence[Batch], scale: float, lr: float) -> Tensor:
        self.lr = lr
        return self.schedule.run(batches, scale)

    def update(self, valid: Tensor, passes: Passes = torch.isfinite) -> tuple[Tensor, Tensor]:
        norm = global_norm(self.model.weights, self.model.mesh.size, self.factors) / valid
        moves = passes(norm)
        self.optimizer.step(self.lr, clip_factor(norm, self.clip) / valid, moves)
        settle_routers(self.model.stages, self.model.mesh.axes, moves)
        for w in self.model.weights:
            w.forget_gradient()
        return norm, moves

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        return self.schedule.evaluate(batches)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return self.optimizer.state()

    def pieces(self) -> dict[str, Piece]:
        return state_pieces(self.model, self.state())

    def loaded(self, pieces: dict[str, Piece]) -> None:
        """The pieces are the live state."""
