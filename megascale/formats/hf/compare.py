"""Whether two stored tensors hold the same numbers."""

from __future__ import annotations

import math

import torch

from megascale.checkpoint.streaming import Target
from megascale.formats.tensor_maps import TensorSource

COMPARED = 1 << 24  # elements of tables compared at once


def same_numbers(source: TensorSource, one: Target, other: Target | None) -> bool:
    """Compares slab by slab; tensors of different shapes or dtypes differ."""
    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    rows = max(1, COMPARED // max(1, math.prod(one.shape[1:])))
    for first in range(0, one.shape[0] if one.shape else 0, rows):
        size = (min(rows, one.shape[0] - first), *one.shape[1:])
        at = (first, *[0] * (len(size) - 1))
        if not torch.equal(source.read(one.name, at, size), source.read(other.name, at, size)):
            return False
    return True
