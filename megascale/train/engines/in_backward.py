"""Updates during backward: under layered accumulation a layer's gradient is complete long before the step ends, so its weights can be
updated and the gradient freed while earlier layers still compute. Clipping by the global norm would have to wait for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megascale.comm.collectives import all_reduce
from megascale.comm.mesh import Mesh
from megascale.comm.piece import Piece
from megascale.config.schema import Optim
from megascale.data.loader import Batch
from megascale.optim.clip import global_norm, norm_factors
from megascale.optim.optimizer import Optimizer
from megascale.optim.optimizers import optimizer_over
from megascale.parallel.expert import settle_routers
from megascale.parallel.model import ParallelModel, Weight
from megascale.schedule.layered import Layered
from megascale.train.engines.engine import Passes
from megascale.train.state import state_pieces


def valid_share(batches: Sequence[Batch], scale: float, mesh: Mesh, device: torch.device) -> Tensor:
    """Valid targets of the step over all data ranks × `scale`, before the update. 0-dim, fp64."""
    valid = torch.full((), sum(b.valid for b in batches) * scale, dtype=torch.float64, device=device)
    return all_reduce(all_reduce(valid, mesh["dp_shard"]), mesh["dp_replicate"])


class InBackward:
    """An engine with one optimizer per stage. A stage whose gradient is not finite is not updated; later stages have been by then, and
    the step counts as skipped.
    """

    def __init__(self, model: ParallelModel, schedule: Layered, cfg: Optim, device: torch.device, tokens: int = 1) -> None:
        self.model, self.schedule, self.device = model, schedule, device
        schedule.after_stage = self._update_stage
        self.weights = [_weights_of(model, i) for i in range(len(model.stages))]
        self.optimizers: list[Optimizer | None] = [optimizer_over(own, model, cfg, tokens) if own else None for own in self.weights]
        self.lr, self.factors = 0.0, norm_factors(model.weights, cfg)
        self.valid = torch.ones((), dtype=torch.float64, device=device)
        self.squares: list[Tensor] = []

    def run(self, batches: Sequence[Batch], scale: float, lr: float) -> Tensor:
        self.lr, self.squares = lr, []
        self.valid = valid_share(batches, scale, self.model.mesh, self.device)
        return self.schedule.run(batches, scale)

    def _update_stage(self, number: int) -> None:
        weights, optimizer = self.weights[number], self.optimizers[number]
        self.model.finish_gradients(weights)
        norm = global_norm(weights, self.model.mesh.size, self.factors) / self.valid
        self.squares.append(norm.square())
        if optimizer is not None:
            optimizer.step(self.lr, 1.0 / self.valid, torch.isfinite(norm))
        for w in weights:
            w.forget_gradient()

    def update(self, valid: Tensor, passes: Passes = torch.isfinite) -> tuple[Tensor, Tensor]:
        """Stages are updated by now: what a step `passes` by cannot be known before, and a rule refuses `train.skip_spikes`."""
        norm = torch.stack(self.squares).sum().sqrt()
        finite = torch.isfinite(norm)
        settle_routers(self.model.stages, self.model.mesh.axes, finite)
        return norm, finite

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        return self.schedule.evaluate(batches)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The state of all stages as that of one optimizer."""
        merged: dict[str, dict[str, Tensor]] = {}
        for optimizer in self.optimizers:
            for key, tensors in optimizer.state().items() if optimizer is not None else ():
                merged.setdefault(key, {}).update(tensors)
        return merged

    def pieces(self) -> dict[str, Piece]:
        return state_pieces(self.model, self.state())

    def loaded(self, pieces: dict[str, Piece]) -> None:
        """The pieces are the live state."""


def _weights_of(model: ParallelModel, number: int) -> list[Weight]:
    own = {id(p) for p in model.stages[number].parameters()}
    return [w for w in model.weights if id(w.parameter) in own]
