"""Tensors of theirs whose last dimension alternates between two of ours, seen with that dimension split into pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from megascale.checkpoint.streaming import ReadSlice, Target
from megascale.formats.tensor_maps import Sizes, TensorSource


def joined(shape: Sizes) -> Sizes:
    """The stored shape of a tensor that is seen in pairs."""
    return (*shape[:-2], shape[-2] * shape[-1])


@dataclass(frozen=True)
class Paired:
    """A `TensorSource` that shows the tensors `names` of another in pairs."""

    source: TensorSource
    names: frozenset[str]

    @cached_property
    def tensors(self) -> Mapping[str, Target]:
        split = {n: replace(t, shape=(*t.shape[:-1], t.shape[-1] // 2, 2)) for n, t in self.source.tensors.items() if n in self.names}
        return {**self.source.tensors, **split}

    @property
    def stamp(self) -> str:
        return self.source.stamp

    def read(self, name: str, offset: Sizes, shape: Sizes) -> Tensor:
        if name not in self.names:
            return self.source.read(name, offset, shape)
        *outer, pair, part = offset
        *sizes, pairs, parts = shape
        found = self.source.read(name, (*outer, 2 * pair), (*sizes, 2 * pairs))
        return found.unflatten(-1, (pairs, 2))[..., part : part + parts]


@dataclass(frozen=True)
class Interleaved:
    """A `ReadSlice` that makes the stored form of tensors that `produce` makes in pairs."""

    produce: ReadSlice
    names: frozenset[str]

    def __call__(self, name: str, offset: Sizes, shape: Sizes) -> Tensor:
        if name not in self.names:
            return self.produce(name, offset, shape)
        *outer, begin = offset
        *sizes, number = shape
        first, end = begin // 2, -(-(begin + number) // 2)
        found = self.produce(name, (*outer, first, 0), (*sizes, end - first, 2)).flatten(-2)
        return found[..., begin - 2 * first : begin - 2 * first + number].contiguous()
