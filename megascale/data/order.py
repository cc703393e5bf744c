"""The order of samples in closed form: any sample number maps directly to its data, so a position is a single integer."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascale.errors import UsageError
from megascale.splitmix import FIRST, GOLDEN, SECOND, mix64

BLOCK = 65536  # samples in a block, which has exactly the mixture's weights
ROUNDS = 4


def permute(index: int, size: int, *key: object) -> int:
    """The image of `index` under a pseudo-random permutation of range(size) chosen by `key` (plain numbers and texts).

    A Feistel network over the next even power of two, walked along its cycle until it falls inside the range: no table, whatever the size.
    """
    half, keys = _half_and_keys(size, key)
    while True:
        index = _feistel(index, half, keys)
        if index < size:
            return index


def permute_many(indices: NDArray[np.integer], size: int, *key: object) -> NDArray[np.int64]:
    """`permute` of each of `indices` [n]."""
    half, keys = _half_and_keys(size, key)
    values = _feistel(indices.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(values >= size)).size:
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _half_and_keys(size: int, key: tuple[object, ...]) -> tuple[int, list[int]]:
    """Bits of half a number, and the keys of the rounds."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
    return half, [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]


def _feistel(x: Any, half: int, keys: list[int]) -> Any:
    """One pass for one number (int) or many (uint64 array): the same arithmetic works for both."""
    mask = (1 << half) - 1
    left, right = x >> half, x & mask
    for k in keys:
        left, right = right, left ^ (mix64(right ^ k) & mask)
    return left << half | right


@dataclass(frozen=True)
class Unseen:
    """The numbers of a source's samples that earlier parts of a run have not drawn: `single` [n], sorted, then all from `end` on."""

    single: NDArray[np.int64]
    end: int

    def at(self, index: int) -> int:
        """Number `index` of the unseen ones."""
        return int(self.single[index]) if index < len(self.single) else self.end + index - len(self.single)

    def without(self, count: int, more: NDArray[np.int64]) -> Unseen:
        """What is left once the first `count` of them and those at the indices `more`, all of them ≥ count, are drawn."""
        last = int(more.max()) + 1 if more.size else count
        kept = np.setdiff1d(np.arange(count, last, dtype=np.int64), more)
        among = kept[kept < len(self.single)]
        beyond = kept[len(among) :] - len(self.single) + self.end
        return Unseen(np.concatenate([self.single[among], beyond, self.single[last:]]), max(self.end, self.at(last)))


ALL = Unseen(np.empty(0, np.int64), 0)


@dataclass(frozen=True)
class MixPlan:
    """Sample number → (dataset, number within the dataset). Every block of 65536 samples holds each dataset exactly `quotas` times.

    start     the first sample of this mixture; blocks count from there
    unseen    by dataset, what an earlier mixture has left of it
    in_order  a dataset's samples come in the order of their numbers; otherwise a block shuffles them
    """

    seed: int
    quotas: tuple[int, ...]
    start: int = 0
    unseen: tuple[Unseen, ...] = ()
    in_order: bool = False

    def locate(self, sample: int) -> tuple[int, int]:
        dataset, number = self._own(sample - self.start)
        return dataset, self.unseen[dataset].at(number) if self.unseen else number

    def continued(self, start: int, unseen: tuple[Unseen, ...], in_order: bool) -> MixPlan:
        return replace(self, start=start, unseen=unseen, in_order=in_order)

    def left(self, dataset: int, end: int) -> Unseen:
        """What is left of a dataset once this mixture has drawn the samples from `start` to before `end`."""
        before = self.unseen[dataset] if self.unseen else ALL
        if len(self.quotas) == 1:
            return before.without(end - self.start, ALL.single)
        (block, rest), quota = divmod(end - self.start, BLOCK), self.quotas[dataset]
        first = sum(self.quotas[:dataset])
        places = permute_many(np.arange(rest, dtype=np.int64), BLOCK, *self._key(block)) - first
        places = places[(places >= 0) & (places < quota)]
        if self.in_order:
            return before.without(block * quota + len(places), ALL.single)
        return before.without(block * quota, block * quota + places)

    def _own(self, sample: int) -> tuple[int, int]:
        """The dataset, and the number among those that this mixture draws from it."""
        if len(self.quotas) == 1:
            return 0, sample
        block, place = divmod(sample, BLOCK)
        if self.in_order:
            owners, ranks = _block_in_order(self._key(block), self.quotas)
            owner = int(owners[place])
            return owner, block * self.quotas[owner] + int(ranks[place])
        place = permute(place, BLOCK, *self._key(block))
        for dataset, quota in enumerate(self.quotas):
            if place < quota:
                return dataset, block * quota + place
            place -= quota
        raise AssertionError("quotas add up to a block")

    def _key(self, block: int) -> tuple[object, ...]:
        return (self.seed, "mix", block) if self.start == 0 else (self.seed, "mix", self.start, block)


@lru_cache(4)
def _block_in_order(key: tuple[object, ...], quotas: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each sample of a block its dataset, and how many of the block's samples before it are of that dataset."""
    dataset = np.searchsorted(np.cumsum(quotas), permute_many(np.arange(BLOCK, dtype=np.int64), BLOCK, *key), side="right")
    rank = np.empty(BLOCK, np.int64)
    for number, quota in enumerate(quotas):
        rank[dataset == number] = np.arange(quota)
    return dataset, rank


def plan_mixture(weights: list[float], names: list[str], seed: int) -> MixPlan:
    """Quotas by largest remainder. Raises UsageError for a weight that is not positive, or too small to ever be drawn."""
    for name, weight in zip(names, weights):
        if not (weight > 0 and math.isfinite(weight)):
            raise UsageError(f"data: the weight of {name} is {weight}, but it must be positive: correct or remove the entry")
    total = sum(weights)
    exact = [w / total * BLOCK for w in weights]
    quotas = [int(x) for x in exact]
    for i in sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])[: BLOCK - sum(quotas)]:
        quotas[i] += 1
    for name, weight, quota in zip(names, weights, quotas):
        if quota == 0:
            raise UsageError(
                f"data: the weight {weight} of {name} is less than one sample in {BLOCK} of the total {total}: raise it or remove the entry"
            )
    return MixPlan(seed, tuple(quotas))


def split_documents(count: int, fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents 0…count−1 → (train, valid). The choice is a fixed hash of the number, so every run holds out the same documents."""
    # An older hash than mix64, kept because held-out documents must stay held out.
    numbers = np.arange(count, dtype=np.uint64)
    mixed = (numbers + np.uint64(GOLDEN)) * np.uint64(FIRST)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(SECOND)
    rank = (mixed >> np.uint64(11)).astype(np.float64) / float(1 << 53)
    held = rank < fraction
    if fraction > 0 and count >= 2:
        held[int(np.argmin(rank))] = True
        held[int(np.argmax(rank))] = False
    return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)
