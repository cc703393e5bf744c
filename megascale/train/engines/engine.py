"""What turns micro-batches into updated weights: our own schedules and optimizers, or an engine that owns both (DeepSpeed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megascale.comm.piece import Piece
from megascale.data.loader import Batch
from megascale.optim.clip import clip_factor, global_norm
from megascale.optim.optimizer import Optimizer
from megascale.parallel.expert import settle_routers
from megascale.parallel.model import ParallelModel
from megascale.schedule.accumulate import Schedule
from megascale.train.state import state_pieces


class Engine(Protocol):
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
