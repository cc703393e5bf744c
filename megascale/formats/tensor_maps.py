"""Maps between our tensors and another format's, as pairs of rectangles that the same code uses in both directions.

A map says that a rectangle of one of our tensors is a rectangle of one of theirs, dimension by dimension. Fused projections, transposed
products, banks of experts and stacked layers are all lists of maps; no other code knows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megascale.checkpoint.streaming import Target
from megascale.errors import UsageError

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class TensorMap:
    """The rectangle `size` at `at` of our tensor is one of theirs, at `to`.

    axes  for each dimension of ours the dimension of theirs; None if theirs has none and our size is 1. Dimensions of theirs without one of
          ours have size 1.
    paired  theirs is seen with its last dimension split into pairs
    """

    ours: str
    at: Sizes
    size: Sizes
    theirs: str
    to: Sizes
    axes: tuple[int | None, ...]
    paired: bool = False

    @property
    def size_there(self) -> Sizes:
        sizes = [1] * len(self.to)
        for n, axis in zip(self.size, self.axes):
            if axis is not None:
                sizes[axis] = n
        return tuple(sizes)


def whole(ours: str, shape: Sizes, theirs: str, *, transposed: bool = False, to: Sizes | None = None) -> TensorMap:
    """Our whole tensor at `to` of theirs (default: the beginning)."""
    axes = tuple(reversed(range(len(shape)))) if transposed and len(shape) == 2 else tuple(range(len(shape)))
    return TensorMap(ours, (0,) * len(shape), shape, theirs, to or (0,) * len(shape), axes)


class TensorSource(Protocol):
    """Stored tensors of any format. Plain data, so that it can be sent to other processes."""

    @property
    def tensors(self) -> Mapping[str, Target]:
        """Dtype and shape by name."""

    @property
    def stamp(self) -> str:
        """A text that changes whenever the stored numbers do."""

    def read(self, name: str, offset: Sizes, shape: Sizes) -> Tensor:
        """Reads a rectangle. Raises UsageError if it is not stored."""


@dataclass(frozen=True)
class Copy:
    """One copy into a target tensor: the rectangle `size` at `at` from `source` at `begin`. `axes`: the source's dimension for each of the
    target's, None if it has none.
    """

    at: Sizes
    size: Sizes
    source: str
    begin: Sizes
    axes: tuple[int | None, ...]


def copies_to_ours(links: Iterable[TensorMap]) -> dict[str, tuple[Copy, ...]]:
    """Our names → the copies that fill them."""
    steps: dict[str, list[Copy]] = {}
    for link in links:
        steps.setdefault(link.ours, []).append(Copy(link.at, link.size, link.theirs, link.to, link.axes))
    return {name: tuple(found) for name, found in steps.items()}


def copies_to_theirs(links: Iterable[TensorMap]) -> dict[str, tuple[Copy, ...]]:
    """Their names → the copies that fill them."""
    steps: dict[str, list[Copy]] = {}
    for link in links:
        axes: list[int | None] = [None] * len(link.to)
        for d, axis in enumerate(link.axes):
            if axis is not None:
                axes[axis] = d
        steps.setdefault(link.theirs, []).append(Copy(link.to, link.size_there, link.ours, link.at, tuple(axes)))
    return {name: tuple(found) for name, found in steps.items()}


@dataclass(frozen=True)
class Rearranged:
    """Makes rectangles of target tensors from a source: a `ReadSlice` for the streaming writer. Elements without a copy are zero.

    dtypes  dtypes of the targets
    """

    source: TensorSource
    steps: Mapping[str, tuple[Copy, ...]]
    dtypes: Mapping[str, torch.dtype]

    def __call__(self, name: str, offset: Sizes, shape: Sizes) -> Tensor:
        out: Tensor | None = None
        for step in self.steps[name]:
            low = tuple(map(max, offset, step.at))
            high = tuple(min(o + n, a + m) for o, n, a, m in zip(offset, shape, step.at, step.size))
            if any(a >= b for a, b in zip(low, high)):
                continue
            sizes = tuple(b - a for a, b in zip(low, high))
            part = self._read(step, low, sizes).to(self.dtypes[name])
            if sizes == shape:
                return part.contiguous()
            if out is None:
                out = torch.zeros(shape, dtype=self.dtypes[name])
            out[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset))] = part
        return torch.zeros(shape, dtype=self.dtypes[name]) if out is None else out

    def _read(self, step: Copy, low: Sizes, sizes: Sizes) -> Tensor:
        begin, wanted = list(step.begin), [1] * len(step.begin)
        for a, n, o, axis in zip(low, sizes, step.at, step.axes):
            if axis is not None:
                begin[axis] += a - o
                wanted[axis] = n
        part = self.source.read(step.source, tuple(begin), tuple(wanted))
        used = [axis for axis in step.axes if axis is not None]
        rest = [d for d in range(part.ndim) if d not in used]
        return part.permute(used + rest).reshape(sizes)


def extents(steps: Mapping[str, tuple[Copy, ...]]) -> dict[str, Sizes]:
    """The least shapes of the targets."""
    return {name: tuple(max(s.at[d] + s.size[d] for s in parts) for d in range(len(parts[0].at))) for name, parts in steps.items()}


def compare_names(expected: Mapping[str, Sizes], found: Mapping[str, Target], where: str, padded: frozenset[str] = frozenset()) -> None:
    """Raises UsageError if stored tensors are not the expected ones: missing, foreign, or of another shape. `padded` ones may have more
    rows.
    """
    missing, foreign = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    problems = []
    if missing:
        problems.append(f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if foreign:
        problems.append(f"{_some(foreign)} {'has' if len(foreign) == 1 else 'have'} no place in a model of its config")
    for name in sorted(expected.keys() & found.keys()):
        want, have = expected[name], found[name].shape
        rows = name in padded and len(have) == len(want) and have[0] >= want[0] and have[1:] == want[1:]
        if want != have and not rows:
            problems.append(f"{name} has shape {list(have)} but the config makes it {list(want)}")
    if problems:
        raise UsageError(
            f"{where} does not hold what its config describes: {'; '.join(problems[:4])}: correct the config or get the files again"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
