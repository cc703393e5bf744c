"""The contents of a checkpoint: every weight and optimizer tensor as pieces, and the trainer's numbers as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale.comm.piece import Piece
from megascale.config.optimizers import optimizers
from megascale.config.schema.averages import is_average
from megascale.errors import UsageError
from megascale.parallel.model import ParallelModel


@dataclass
class Progress:
    """Progress of a run, equal on all ranks. step: updates done; samples: sequences drawn from the data, which is the position in it."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_in_a_row: int = 0
    spikes: dict[str, Any] = field(default_factory=dict)  # what optim/spikes.py compares with
    drawn: list[dict[str, Any]] = field(default_factory=list)  # finished segments of the order of samples (data/history.py)
    logger_ids: dict[str, str] = field(default_factory=dict)  # ids of outside loggers, kept over resumes

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def model_pieces(model: ParallelModel) -> dict[str, Piece]:
    """Live pieces by canonical names under "model."."""
    weights = {f"model.{w.name}": model.piece(w, w.local) for w in model.weights}
    return {**weights, **{f"model.{s.name}": s.piece for s in model.states}}


def state_pieces(model: ParallelModel, optimizer: dict[str, dict[str, Tensor]]) -> dict[str, Piece]:
    """Live pieces of everything that a resume needs: loading into them changes the training state. `optimizer`: `Optimizer.state()`."""
    pieces = model_pieces(model)
    weights = {w.name: w for w in model.weights}
    by_row = {key for row in optimizers().values() for key in row.rows}
    for key, tensors in optimizer.items():
        for name, tensor in tensors.items():
            pieces[f"optim.{key}.{name}"] = _piece(model, weights, name, tensor, key in by_row)
    return pieces


def of_average(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to an average of the weights: a run may continue with others."""
    return name.startswith("optim.") and is_average(name.split(".")[1])


def check_finite(state: dict[str, Piece], folder: Path | None) -> None:
    """Raises UsageError for loaded weights that are not finite, since every step would be skipped. Optimizer state is not checked."""
    for name, piece in state.items():
        if not name.startswith("model.") or not piece.local.is_floating_point():
            continue
        flat = piece.local.detach().reshape(-1)
        # A boolean mask of a whole large weight may exceed free memory.
        if not all(torch.isfinite(part.float() if part.element_size() == 1 else part).all() for part in flat.split(1 << 26)):
            raise UsageError(
                f"{name} in {folder} holds values that are not finite (NaN or infinite): take the weights from another checkpoint"
            )


def _piece(model: ParallelModel, weights: dict[str, Any], name: str, tensor: Tensor, by_row: bool) -> Piece:
    if tensor.ndim == 0:
        return Piece((), (), tensor)
    weight = weights[name]
    if by_row:  # one number for each row; ranks that share a row hold the same
        whole = model.piece(weight, weight.local)
        rows = tuple(slice(0, n) for n in whole.local.shape[:-1])
        return Piece((*whole.shape[:-1], 1), (*whole.offset[:-1], 0), tensor[rows])
    if tensor.shape == weight.local.shape:
        return model.piece(weight, tensor)
    # One number for each block of a row.
    whole, block = model.piece(weight, weight.local), weight.local.shape[-1] // tensor.shape[-1]
    rows = tuple(slice(0, n) for n in whole.local.shape[:-1])
    return Piece((*whole.shape[:-1], whole.shape[-1] // block), (*whole.offset[:-1], whole.offset[-1] // block), tensor[rows])
