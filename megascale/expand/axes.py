"""Maps one dimension of a grown tensor to its source's: plain index maps with weights, built and combined by pure functions.

Writers put values into the residual stream (embedding columns, rows of attention's and feed-forward's output products), readers take them
out. A duplicated dimension is repeated where it is written, and shared where it is read: the copies' weights add up to one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Weights = NDArray[np.float64]

# Values of an index without a source: a fresh draw of the target model, zero, or the mean over the source's dimension.
FRESH, ZERO, MEAN = -1, -2, -3


@dataclass(frozen=True, eq=False)
class AxisMap:
    """source [n'] of every target index: its source index, or FRESH, ZERO, MEAN; weight [n']: its weight; `old`: the source's length.

    shared  the copies of a source add up to it, so noise that sums to zero over them changes nothing
    """

    source: Indices
    weight: Weights
    old: int
    shared: bool = False

    @property
    def size(self) -> int:
        return len(self.source)

    @cached_property
    def known(self) -> NDArray[np.bool_]:
        return self.source >= 0

    @cached_property
    def copies(self) -> Indices:
        """The number of target indices with the same source, per target index [n']; 1 without a source."""
        counts = np.bincount(self.source[self.known], minlength=self.old)
        return np.where(self.known, counts[np.maximum(self.source, 0)], 1)

    @cached_property
    def uniform_copies(self) -> int | None:
        """The number of copies if it is the same for every source index; None if they differ."""
        counts = np.bincount(self.source[self.known], minlength=self.old)
        return int(counts[0]) if len(counts) and (counts == counts[0]).all() else None

    @property
    def is_identity(self) -> bool:
        return self.size == self.old and bool((self.source == np.arange(self.old)).all()) and bool((self.weight == 1).all())

    @property
    def unused(self) -> int:
        """Number of source indices that no target index uses."""
        return self.old - len(np.unique(self.source[self.known]))

    def scaled(self, factor: float) -> AxisMap:
        return replace(self, weight=self.weight * factor)

    def filled(self, kind: int) -> AxisMap:
        """The same map, with `kind` at every index without a source."""
        return replace(self, source=np.where(self.known, self.source, kind))


def axis(source: list[int] | Indices, old: int, weight: Weights | None = None) -> AxisMap:
    indices = np.asarray(source, np.int64)
    return AxisMap(indices, np.ones(len(indices)) if weight is None else weight, old)


def same(size: int) -> AxisMap:
    return axis(np.arange(size), size)


def repeated(old: int, size: int, copies: int, rest: int) -> AxisMap:
    """`copies` times the whole source, then `rest` (FRESH, ZERO or MEAN)."""
    source = np.full(size, rest, np.int64)
    source[: copies * old] = np.tile(np.arange(old), copies)
    return axis(source, old)


def circular(old: int, size: int) -> AxisMap:
    """The source over and over until `size` is full: any size, some indices with one copy more than others."""
    return axis(np.arange(size) % old, old)


def shared(whole: AxisMap, split: tuple[float, float] = (1.0, 1.0)) -> AxisMap:
    """A map whose copies add up to their source: the first copy gets split[0] parts, each other copy split[1]."""
    first, other = split
    seen: dict[int, int] = {}
    parts = np.ones(whole.size)
    for i, s in enumerate(whole.source.tolist()):
        if s >= 0:
            parts[i] = first if s not in seen else other
            seen[s] = i
    total = np.bincount(whole.source[whole.known], parts[whole.known], minlength=whole.old)
    weight = np.where(whole.known, parts / np.where(whole.known, total[np.maximum(whole.source, 0)], 1), 1.0)
    return AxisMap(whole.source, whole.weight * weight, whole.old, shared=True)


def inside(outer: AxisMap, inner: AxisMap) -> AxisMap:
    """The map of outer × inner (heads × channels of a head), inner running faster. A part without a source decides, zero before fresh."""
    o, i = outer.source[:, None], inner.source[None, :]
    lacking = np.where((o == ZERO) | (i == ZERO), ZERO, np.where((o == MEAN) | (i == MEAN), MEAN, FRESH))
    source = np.where((o >= 0) & (i >= 0), o * inner.old + i, lacking)
    weight = outer.weight[:, None] * inner.weight[None, :]
    return AxisMap(source.reshape(-1), weight.reshape(-1), outer.old * inner.old, outer.shared or inner.shared)


def beside(*parts: AxisMap) -> AxisMap:
    """The map of dimensions that are joined into one, one after the other. None of them takes means, which would be over all."""
    begins = np.cumsum([0, *(p.old for p in parts)])
    source = np.concatenate([np.where(p.known, p.source + begin, p.source) for p, begin in zip(parts, begins)])
    return AxisMap(source, np.concatenate([p.weight for p in parts]), int(begins[-1]), any(p.shared for p in parts))


def cancelling(rows: AxisMap) -> tuple[AxisMap, AxisMap]:
    """Neighbouring pairs with equal inputs and opposite outputs (LEMON, arXiv 2310.07999): the rows' map, and the map of the columns that
    take their outputs. An odd one's output is zero, and so is that of new ones, which start differently; of zero rows it starts anyhow.
    """
    number = np.arange(rows.size)
    lone = (rows.size % 2 == 1) & (number == rows.size - 1)
    paired = replace(rows, source=rows.source[number - number % 2], weight=rows.weight[number - number % 2])
    sign = np.where(number % 2 == 0, 1.0, -1.0)
    source = np.where(lone | (paired.source == FRESH), ZERO, np.where(paired.source == ZERO, FRESH, paired.source))
    return paired, AxisMap(source, np.where(paired.known, sign, 1.0), rows.old)
