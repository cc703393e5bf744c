"""Joins what all ranks hold into the tensors of a checkpoint, and shares out copies among those that hold them.

The first rank does it for everyone, so it works on arrays over ranks: a Python object for each piece of each rank would take minutes and
gigabytes over thousands of ranks.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megascale.checkpoint.grid import Array, Chunk, grid_from, many
from megascale.checkpoint.index import DTYPES, TensorEntry, covering_problem
from megascale.checkpoint.shards import shard_name
from megascale.errors import UsageError


class Held(NamedTuple):
    """A rectangle that a rank holds of a tensor; `dtype` as the index spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    sizes: tuple[int, ...]


def packed(held: Sequence[Held]) -> bytes:
    """What a rank holds, small enough to be sent by thousands of ranks to one."""
    numbers = np.array([n for h in held for n in (*h.offset, *h.sizes)], np.int64)
    names = json.dumps([h[:3] for h in held], separators=(",", ":")).encode()
    return zlib.compress(len(names).to_bytes(8, "little") + names + numbers.tobytes(), 1)


def unpacked(data: bytes) -> tuple[bytes, Array]:
    """The names as they were sent, equal for ranks that hold pieces of the same tensors, and the numbers."""
    raw = zlib.decompress(data)
    length = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:length], np.frombuffer(raw[length:], np.int64)


@dataclass
class Pieces:
    """The pieces of one tensor: by piece its rank, its number among the rank's, where it begins and its size, both [pieces, dims]."""

    dtype: str
    shape: tuple[int, ...]
    ranks: Array
    numbers: Array
    offsets: Array
    sizes: Array


@dataclass
class Joined:
    """tensors   what the checkpoint holds
    left_out  by rank, the numbers of the pieces that another rank writes
    names     by rank, the tensor of each piece
    copies    rank and number of a first holder, and of another one of the same rectangle, each an array
    """

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    left_out: list[Array] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)
    copies: Sequence[Array] = (np.zeros(0, np.int64),) * 4

    def unlike(self, sums: Sequence[Sequence[int]]) -> tuple[str, int, int] | None:
        """The first tensor whose copies have other checksums, and the two ranks; `sums` by rank and number."""
        begins = np.concatenate([[0], np.cumsum([len(s) for s in sums])])
        flat = np.concatenate([np.asarray(s, np.int64) for s in sums])
        first, number, other, place = self.copies
        wrong = np.flatnonzero(flat[begins[first] + number] != flat[begins[other] + place])
        if not len(wrong):
            return None
        at = wrong[0]
        return self.names[first[at]][number[at]], int(first[at]), int(other[at])


def join(everyone: Sequence[bytes]) -> Joined:
    """`everyone`: `packed` by rank. Raises UsageError, naming the tensor, for pieces that contradict each other or do not make whole
    tensors.
    """
    made, load = Joined(), np.zeros(len(everyone), np.int64)
    files = tuple(shard_name(rank) for rank in range(len(everyone)))
    out: list[list[Array]] = [[] for _ in everyone]
    copies: list[tuple[Array, Array, Array, Array]] = []
    for name, pieces in _tensors(everyone, made.names):
        owner, cell, cells = _owners(name, pieces, load)
        mine = owner[cell] == pieces.ranks
        for rank, number in zip(pieces.ranks[~mine].tolist(), pieces.numbers[~mine]):
            out[rank].append(number)
        first = np.full(cells, -1, np.int64)
        first[cell[::-1]] = np.arange(len(cell))[::-1]
        again = np.flatnonzero(first[cell] != np.arange(len(cell)))
        where = first[cell[again]]
        copies.append((pieces.ranks[where], pieces.numbers[where], pieces.ranks[again], pieces.numbers[again]))
        made.tensors[name] = _entry(name, pieces, np.flatnonzero(mine), files)
    made.left_out = [np.asarray(numbers, np.int64) for numbers in out]
    if copies:
        made.copies = [np.concatenate(part) for part in zip(*copies)]
    return made


def _tensors(everyone: Sequence[bytes], names: list[list[str]]) -> Iterator[tuple[str, Pieces]]:
    """The pieces of each tensor, in the order in which the ranks name them; fills `names` by rank."""
    groups: dict[bytes, list[tuple[int, Array]]] = {}
    for rank, data in enumerate(everyone):
        head, numbers = unpacked(data)
        groups.setdefault(head, []).append((rank, numbers))
    parts: dict[str, list[tuple[str, tuple[int, ...], Array, int, Array]]] = {}
    by_rank: dict[int, list[str]] = {}
    for head, members in groups.items():
        ranks, numbers = np.array([rank for rank, _ in members]), np.stack([n for _, n in members])
        held, at = json.loads(head), 0
        theirs = [name for name, _, _ in held]
        by_rank |= dict.fromkeys(ranks.tolist(), theirs)
        for number, (name, dtype, shape) in enumerate(held):
            width = 2 * len(shape)
            parts.setdefault(name, []).append((dtype, tuple(shape), ranks, number, numbers[:, at : at + width]))
            at += width
    names.extend(by_rank[rank] for rank in range(len(everyone)))
    for name, found in parts.items():
        dtype, shape, first, _, _ = found[0]
        for its, other, ranks, _, _ in found:
            if (its, other) != (dtype, shape):
                raise UsageError(
                    f"{name} is {DTYPES[dtype]} {list(shape)} on rank {first[0]} and {DTYPES[its]} {list(other)} on rank {ranks[0]}: "
                    "all ranks must hold pieces of the same tensor"
                )
        ranks = np.concatenate([f[2] for f in found])
        numbers = np.concatenate([np.full(len(f[2]), f[3]) for f in found])
        places = np.concatenate([f[4] for f in found])
        order = np.argsort(ranks, kind="stable")
        places = places[order]
        yield name, Pieces(dtype, shape, ranks[order], numbers[order], places[:, : len(shape)], places[:, len(shape) :])


def _owners(name: str, p: Pieces, load: Array) -> tuple[Array, Array, int]:
    """The rank that writes each different rectangle, that of its holders with the least to write so far; the rectangle of each piece; and
    how many there are. Adds to the `load` in bytes, by rank.
    """
    cell = np.unique(p.offsets, axis=0, return_inverse=True)[1].reshape(-1) if p.shape else np.zeros(len(p.ranks), np.int64)
    order = np.argsort(cell, kind="stable")
    begins = np.flatnonzero(np.diff(cell[order], prepend=-1))
    counts = np.diff(begins, append=len(order))
    first = order[begins][cell]
    unlike = np.flatnonzero((p.sizes != p.sizes[first]).any(axis=1))
    if len(unlike):
        other, one = unlike[0], first[unlike[0]]
        raise UsageError(
            f"the pieces {p.sizes[one].tolist()} on rank {p.ranks[one]} and {p.sizes[other].tolist()} on rank {p.ranks[other]} of {name} "
            f"overlap at {p.offsets[other].tolist()}"
        )
    nbytes = p.sizes[order[begins]].prod(axis=1) * DTYPES[p.dtype].itemsize
    owner = np.empty(len(begins), np.int64)
    for count in np.unique(counts):  # rectangles with equally many holders together
        which = np.flatnonzero(counts == count)
        holders = p.ranks[order[begins[which, None] + np.arange(count)]]
        owner[which] = holders[np.arange(len(which)), load[holders].argmin(axis=1)]
    np.add.at(load, owner, nbytes)
    return owner, cell, len(begins)


def _entry(name: str, p: Pieces, written: Array, files: Sequence[str]) -> TensorEntry:
    if math.prod(p.shape) == 0:
        return TensorEntry(p.dtype, p.shape, ())
    offsets, sizes, ranks = p.offsets[written], p.sizes[written], p.ranks[written]
    if many(ranks) and (grid := grid_from(p.shape, offsets, sizes, ranks, files)) is not None:
        return TensorEntry(p.dtype, p.shape, grid)
    chunks = zip(map(tuple, offsets.tolist()), map(tuple, sizes.tolist()), (files[rank] for rank in ranks.tolist()))
    entry = TensorEntry(p.dtype, p.shape, tuple(Chunk(*c) for c in chunks))
    if problem := covering_problem(entry):
        raise UsageError(f"the ranks' pieces do not make whole tensors: those of {name} {problem}")
    return entry
