"""What a checkpoint of a run holds: every weight and optimizer tensor as pieces, and the numbers of the trainer as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from megascale.comm.piece import Piece
from megascale.parallel.apply import ParallelModel


@dataclass
class Progress:
    """Where a run stands, on every rank alike. step: updates done; samples: sequences drawn from the data, which is its position."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_in_a_row: int = 0
    logger_ids: dict[str, str] = field(default_factory=dict)  # of outside loggers, kept over resumes

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def model_pieces(model: ParallelModel) -> dict[str, Piece]:
    """Canonical names under "model.", live."""
    weights = {f"model.{w.name}": model.piece(w, w.local) for w in model.weights}
    return {**weights, **{f"model.{s.name}": s.piece for s in model.states}}


def state_pieces(model: ParallelModel, optimizer: dict[str, dict[str, Tensor]]) -> dict[str, Piece]:
    """Everything that a resume needs, live: loading into these pieces changes the training state. `optimizer`: `Optimizer.state()`."""
    pieces = model_pieces(model)
    weights = {w.name: w for w in model.weights}
    for key, tensors in optimizer.items():
        for name, tensor in tensors.items():
            pieces[f"optim.{key}.{name}"] = _piece(model, weights, name, tensor)
    return pieces


def _piece(model: ParallelModel, weights: dict[str, Any], name: str, tensor: Tensor) -> Piece:
    return Piece((), (), tensor) if tensor.ndim == 0 else model.piece(weights[name], tensor)
