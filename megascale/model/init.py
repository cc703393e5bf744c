"""Weights drawn from (seed, name, index block): every layout starts from the same model, and no rank ever holds more than its own part.

A tensor is covered by fixed tiles of its last two dimensions, each with its own generator. A rank draws the tiles that its rectangle
touches and keeps what it needs. Numbers are drawn in fp32 on the CPU, so that device and dtype do not change the initial weights.
Orthogonal matrices, which are small, are the exception: every rank draws them whole, since all rows depend on each other.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megascale.comm.piece import Piece
from megascale.model.spec import ParamSpec

TILE = (256, 1024)  # rows, columns; a change here changes the initial weights of every run


@torch.no_grad()
def initialize(piece: Piece, name: str, spec: ParamSpec, seed: int) -> None:
    """Fills `piece.local` with its part of the tensor's initial values."""
    if spec.std == 0.0:
        piece.local.fill_(spec.mean)
        return
    if piece.local.numel() == 0:
        return
    shape, local, offset = piece.shape, piece.local, piece.offset
    if spec.orthogonal:
        assert spec.equal_rows, "its one user, X-MoE, gives its rows their length"
        normal = torch.empty(shape)
        initialize(Piece(shape, (0,) * len(shape), normal), name, replace(spec, orthogonal=False, equal_rows=False), seed)
        whole = orthogonal(normal)
        whole *= spec.std * shape[-1] ** 0.5 / whole.norm(dim=-1, keepdim=True)
        local.copy_(whole.float()[tuple(slice(o, o + n) for o, n in zip(offset, local.shape))])
        return
    tile = [1] * max(0, len(shape) - 2) + ([TILE[0] * TILE[1]] if len(shape) == 1 else list(TILE))
    first = [o // t for o, t in zip(offset, tile)]
    last = [(o + n - 1) // t for o, n, t in zip(offset, local.shape, tile)]
    for index in itertools.product(*(range(a, b + 1) for a, b in zip(first, last))):
        begin = [i * t for i, t in zip(index, tile)]
        values = _draw(seed, name, index, [min(t, n - b) for t, n, b in zip(tile, shape, begin)], spec)
        # The overlap of tile and rectangle, in both coordinate systems.
        low = [max(b, o) for b, o in zip(begin, offset)]
        high = [min(b + v, o + n) for b, v, o, n in zip(begin, values.shape, offset, local.shape)]
        source = tuple(slice(x - b, y - b) for x, y, b in zip(low, high, begin))
        target = tuple(slice(x - o, y - o) for x, y, o in zip(low, high, offset))
        local[target].copy_(values[source].mul_(spec.std).add_(spec.mean))
    if spec.equal_rows:
        assert local.shape[-1] == shape[-1], "rows of equal length must be whole where they are drawn"
        local.mul_(spec.std * shape[-1] ** 0.5 / local.norm(dim=-1, keepdim=True))


def orthogonal(normal: Tensor) -> Tensor:
    """Standard normal [rows, columns] → the Q of its QR decomposition in fp64: orthonormal rows or columns, whichever are fewer. Making R's
    diagonal positive gives a uniform distribution (Mezzadri, arXiv math-ph/0609050; as `torch.nn.init.orthogonal_`).
    """
    wide = normal.shape[0] < normal.shape[1]
    q, r = torch.linalg.qr(normal.double().t() if wide else normal.double())
    q = q * r.diagonal().sign()
    return q.t() if wide else q


def _log_decay(u: Tensor) -> Tensor:
    """The logarithm of a decay that is uniform in (0, 16]."""
    return torch.log(16.0 * (1.0 - u))


def _step_bias(u: Tensor) -> Tensor:
    """The number whose softplus is a step from 0.001 to 0.1 with a uniform logarithm."""
    step = torch.exp(math.log(0.001) + u * math.log(0.1 / 0.001))
    return step + torch.log(-torch.expm1(-step))


# From uniform numbers in [0, 1): the initial decays of linear attention's heads (Mamba, arXiv 2312.00752; Gated DeltaNet).
LAWS: dict[str, Callable[[Tensor], Tensor]] = {"decay": _log_decay, "step": _step_bias}


def _draw(seed: int, name: str, index: tuple[int, ...], shape: list[int], spec: ParamSpec) -> Tensor:
    """Numbers of one tile by the spec's law: standard normal, of which `truncated` redraws those beyond two standard deviations."""
    digest = hashlib.blake2b(f"{seed}/{name}/{index}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    if spec.law is not None:
        return LAWS[spec.law](torch.rand(shape, generator=generator))
    if spec.truncated:
        return torch.nn.init.trunc_normal_(torch.empty(shape), a=-2.0, b=2.0, generator=generator)
    return torch.randn(shape, generator=generator)
