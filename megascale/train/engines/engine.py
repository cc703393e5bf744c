"""What turns micro-batches into updated weights: our own schedules and optimizers, or an engine that owns both (DeepSpeed).

A training step has two halves, `backward` and `update`; between them the gradients of the global batch lie on the weights. The trainer, the
layout tests and the benchmarks all run these two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.comm.mesh import Mesh
from megascale.comm.piece import Piece
from megascale.data.loader import Batch
from megascale.optim.clip import clip_factor, global_norm
from megascale.optim.optimizer import Optimizer
from megascale.parallel.expert import settle_routers
from megascale.parallel.model import ParallelModel
from megascale.schedule.accumulate import Schedule
from megascale.train.state import state_pieces


class Engine(Protocol):
    """`backward` and `update` below make a step of it."""

    model: ParallelModel

    def run(self, batches: Sequence[Batch], scale: float, lr: float) -> Tensor:
        """Forward and backward of a step, as `Schedule.run`; `lr` is the rate of its update."""

    def update(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients ÷ `valid`, clipped, applied. Returns their norm before clipping and whether it is finite; where not, nothing moves."""

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """As `Schedule.evaluate`."""

    def pieces(self) -> dict[str, Piece]:
        """All that a resume needs, to be saved or loaded into. Collective."""

    def loaded(self, pieces: dict[str, Piece]) -> None:
        """`pieces` have been loaded into: takes them over where they are not the live state itself. Collective."""


class Sums(NamedTuple):
    """Sums over all ranks, 0-dim, fp64, on the device: loss and number of valid targets of the global batch, both times `scale`, and how
    many ranks ask to stop.
    """

    loss: Tensor
    valid: Tensor
    stop: Tensor


class Outcome(NamedTuple):
    """What a step did, 0-dim, on the device: loss per valid target, gradient norm before clipping, and whether it is finite. If not, no
    weight has moved.
    """

    loss: Tensor
    norm: Tensor
    finite: Tensor


def backward(engine: Engine, batches: Sequence[Batch], scale: float, lr: float, stop: Callable[[], bool] = lambda: False) -> Sums:
    """The first half of a step: leaves the gradients of the global batch, times `scale`, on the weights.

    stop  asked after the last micro-batch: whether this rank wants all to stop
    """
    loss = engine.run(batches, scale, lr)
    # Loss and gradients carry a fixed scale; the number of valid targets is known only to all ranks together.
    return total_over_ranks(engine.model.mesh, loss, sum(b.valid for b in batches) * scale, float(stop()))


def update(engine: Engine, sums: Sums) -> Outcome:
    """The second half: divides the gradients by the number of valid targets, clips and applies them.

    Without any valid target this is 0 ÷ 0, hence not finite, and nothing moves.
    """
    norm, finite = engine.update(sums.valid)
    return Outcome(sums.loss / sums.valid, norm, finite)


def total_over_ranks(mesh: Mesh, loss: Tensor, valid: float, stop: float = 0.0) -> Sums:
    """Three numbers summed over the ranks in one message; ranks with the same data count once."""
    # All stages and all of cp know the whole batch. Their losses add up: zero but at the head, and of a rank's own positions.
    counted, share = valid if mesh.tells_batch else 0.0, float(mesh.tells_loss)
    numbers = torch.stack([loss.to(torch.float64) * share, *torch.tensor([counted, stop], dtype=torch.float64).to(loss.device)])
    if mesh.size > 1:
        dist.all_reduce(numbers)
    return Sums(*numbers.unbind())


@dataclass
class Native:
    """Our own schedule and optimizer over the weights of `model`. `clip`: the largest norm; 0 never clips."""

    model: ParallelModel
    schedule: Schedule
    optimizer: Optimizer
    clip: float
    lr: float = 0.0
    factors: Mapping[str, float] = field(default_factory=dict)  # in the gradient norm, by weight

    def run(self, batches: Sequence[Batch], scale: float, lr: float) -> Tensor:
        self.lr = lr
        return self.schedule.run(batches, scale)

    def update(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        norm = global_norm(self.model.weights, self.model.mesh.size, self.factors) / valid
        finite = torch.isfinite(norm)
        self.optimizer.step(self.lr, clip_factor(norm, self.clip) / valid, finite)
        settle_routers(self.model.stages, self.model.mesh.axes, finite)
        for w in self.model.weights:
            w.forget_gradient()
        return norm, finite

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        return self.schedule.evaluate(batches)

    def pieces(self) -> dict[str, Piece]:
        return state_pieces(self.model, self.optimizer.state())

    def loaded(self, pieces: dict[str, Piece]) -> None:
        """The pieces are the live state."""
