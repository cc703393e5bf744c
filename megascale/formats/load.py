"""Weights of any format into a model on any layout: every rank reads the rectangles that it needs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megascale.checkpoint.streaming import ReadSlice, slabs
from megascale.comm.mesh import Mesh
from megascale.comm.piece import Piece
from megascale.config.schema import Model, Parallel
from megascale.formats.shapes import MODEL
from megascale.model.layers import Fp8
from megascale.model.shape import Shape
from megascale.parallel.apply import build_stages, parallelize
from megascale.parallel.model import ParallelModel

SLAB = 1 << 26  # elements per read


@torch.no_grad()
def fill(pieces: Mapping[str, Piece], produce: ReadSlice) -> None:
    """Fills every piece with its rectangle, rounded to the piece's dtype. Raises the source's UsageError."""
    for name, piece in pieces.items():
        if not piece.local.numel():
            continue
        for offset, sizes in slabs(piece.offset, tuple(piece.local.shape), SLAB):
            here = tuple(slice(o - p, o - p + n) for o, p, n in zip(offset, piece.offset, sizes))
            piece.local[here].copy_(produce(name, offset, sizes))


def load_model(
    model: Model,
    seq_len: int,
    produce: ReadSlice,
    mesh: Mesh,
    parallel: Parallel,
    device: torch.device,
    dtype: torch.dtype,
    fp8: Fp8 = "false",
) -> ParallelModel:
    """A model for inference, with weights and activations in `dtype`.

    seq_len  the longest sequence, if positions are learned
    fp8      whether and how hidden products run in FP8
    """
    built = parallelize(build_stages(model, Shape(seq_len, dtype, dtype), parallel, 0), mesh, parallel, device, fp8)
    for w in built.weights:
        with torch.no_grad():
            w.local.zero_()  # padding of a sharded vocabulary
    pieces = {f"{MODEL}{w.name}": built.piece(w, w.local) for w in built.weights}
    fill({**pieces, **{f"{MODEL}{s.name}": s.piece for s in built.states}}, produce)
    built.train(False)
    for module in built.modules:
        module.requires_grad_(False)
    return built
