"""The chunks of a tensor that make a grid, as a few numbers: over thousands of ranks a list of them would be most of a checkpoint's index.

A grid cuts each dimension at the same places everywhere. `edges` has, by dimension, where its parts begin; the parts of FSDP2 and of
tensor parallelism are equally long up to the last, so that a range says it. Files are told by runs: [first, count, step] stands for
first, first + step, … as numbers in the index's list of files.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST = 17  # chunks from which on a grid is written as one; shorter lists are easier to read
MOST = 1 << 24  # chunks of a tensor

Run = tuple[int, int, int]
Array = np.ndarray


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor, stored in `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class Grid(Sequence[Chunk]):
    """The chunks in row-major order, made when they are asked for.

    shape  of the whole tensor
    edges  by dimension, where its parts begin
    runs   the numbers of the chunks' files, in their order
    names  the files by number
    """

    shape: tuple[int, ...]
    edges: tuple[Sequence[int], ...]
    runs: tuple[Run, ...]
    names: Sequence[str]

    def __len__(self) -> int:
        return math.prod(len(edge) for edge in self.edges)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return tuple(self[i] for i in range(*number.indices(len(self))))
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        left, place = number % len(self), []
        for edge in reversed(self.edges):
            left, at = divmod(left, len(edge))
            place.append(at)
        return self._chunk(tuple(reversed(place)))

    def __iter__(self) -> Iterator[Chunk]:
        places = itertools.product(*(range(len(edge)) for edge in self.edges))
        return (self._chunk(place, file) for place, file in zip(places, self._files().tolist()))

    def overlapping(self, offset: Sequence[int], sizes: Sequence[int]) -> list[Chunk]:
        """The chunks that share an element with the rectangle, found without looking at the others. None of `sizes` is 0."""
        spans = [
            range(bisect_right(edge, o) - 1, bisect_left(edge, o + n))  # parts that begin at or before its end
            for edge, o, n in zip(self.edges, offset, sizes)
        ]
        return [self._chunk(place) for place in itertools.product(*spans)]

    def numbered(self, number: Mapping[str, int]) -> Grid:
        """The same with the numbers that files have in an index."""
        names = tuple(number)
        if names == self.names:
            return self
        table = np.array([number.get(name, -1) for name in self.names])
        return Grid(self.shape, self.edges, runs_of(table[self._files()].tolist()), names)

    def file_numbers(self) -> set[int]:
        return set(np.unique(self._files()).tolist())

    def add_sizes(self, elements: Array) -> None:
        """Adds every chunk's elements to those of its file, by number."""
        sizes = np.ones(1, np.int64)
        for edge, n in zip(self.edges, self.shape):
            sizes = np.multiply.outer(sizes, np.diff(np.asarray([*edge, n], np.int64))).reshape(-1)
        np.add.at(elements, self._files(), sizes)

    def _files(self) -> Array:
        return np.concatenate([first + step * np.arange(count) for first, count, step in self.runs])

    def _chunk(self, place: tuple[int, ...], file: int | None = None) -> Chunk:
        offsets = tuple(edge[at] for edge, at in zip(self.edges, place))
        ends = (edge[at + 1] if at + 1 < len(edge) else n for edge, at, n in zip(self.edges, place, self.shape))
        number = self._file(place) if file is None else file
        return Chunk(offsets, tuple(end - begin for begin, end in zip(offsets, ends)), self.names[number])

    def _file(self, place: tuple[int, ...]) -> int:
        number = 0
        for at, edge in zip(place, self.edges):
            number = number * len(edge) + at
        for first, count, step in self.runs:
            if number < count:
                return first + number * step
            number -= count
        raise IndexError(place)


def many(chunks: Sequence[Chunk]) -> bool:
    """Whether they are written as a grid, if they make one."""
    return len(chunks) >= FEWEST


def grid_of(shape: tuple[int, ...], chunks: Sequence[Chunk], number: Mapping[str, int]) -> Grid | None:
    """`chunks` as a grid, if they are many and make one; `number`: of each file."""
    if not many(chunks):
        return None
    offsets, sizes = np.array([c.offsets for c in chunks], np.int64), np.array([c.sizes for c in chunks], np.int64)
    return grid_from(shape, offsets, sizes, np.array([number[c.file] for c in chunks]), tuple(number))


def grid_from(shape: tuple[int, ...], offsets: Array, sizes: Array, files: Array, names: Sequence[str]) -> Grid | None:
    """The same from arrays: `offsets` and `sizes` [chunks, dims], `files` [chunks] as numbers of `names`."""
    edges = [np.unique(column) for column in offsets.T]
    lengths = [np.diff(edge, append=n) for edge, n in zip(edges, shape)]
    counts = [len(edge) for edge in edges]
    if not counts or math.prod(counts) != len(offsets) or any(edge[0] for edge in edges):
        return None
    places = [np.searchsorted(edge, column) for edge, column in zip(edges, offsets.T)]
    cells = np.ravel_multi_index(places, counts)
    order = np.argsort(cells)
    if (cells[order] != np.arange(len(cells))).any() or (np.stack([n[at] for n, at in zip(lengths, places)], 1) != sizes).any():
        return None
    spaced = tuple(_spaced(edge.tolist(), n) for edge, n in zip(edges, shape))
    return Grid(shape, spaced, runs_of(files[order].tolist()), names)


def read_grid(shape: tuple[int, ...], parts: Any, files: Any, names: Sequence[str]) -> Grid:
    """A grid from an index's JSON. Raises TypeError or ValueError for anything that is none."""
    if len(parts) != len(shape):
        raise ValueError("parts along another number of dimensions than the shape's")
    edges = tuple(_edge(part, n) for part, n in zip(parts, shape))
    cells = math.prod(map(len, edges))
    if not 0 < cells <= MOST:
        raise ValueError(f"{cells} parts, but a tensor has 1 to {MOST}")
    runs = []
    for first, count, step in files:
        if any(type(x) is not int or x < 0 for x in (first, count, step)) or count == 0 or first + (count - 1) * step >= len(names):
            raise ValueError(f"files {[first, count, step]}, but the index lists {len(names)}")
        runs.append((first, count, step))
    if sum(count for _, count, _ in runs) != cells:
        raise ValueError(f"files for {sum(count for _, count, _ in runs)} of {cells} parts")
    return Grid(shape, edges, tuple(runs), names)


def runs_of(numbers: Iterable[int]) -> tuple[Run, ...]:
    """File numbers as runs with a constant step of at least 0."""
    runs: list[list[int]] = []
    for n in numbers:
        last = runs[-1] if runs else None
        if last is not None and last[1] == 1 and n >= last[0]:
            last[1:] = [2, n - last[0]]
        elif last is not None and last[1] > 1 and n == last[0] + last[1] * last[2]:
            last[1] += 1
        else:
            runs.append([n, 1, 0])
    return tuple((first, count, step) for first, count, step in runs)


def _spaced(begins: list[int], size: int) -> Sequence[int]:
    """As a range, if all parts but the last are equally long."""
    even = range(0, size, begins[1] if len(begins) > 1 else max(1, size))
    return even if list(even) == begins else tuple(begins)


def _edge(part: Any, size: int) -> Sequence[int]:
    if type(part) is int and part > 0:
        return range(0, size, part)
    if not isinstance(part, list) or any(type(x) is not int for x in part):
        raise TypeError(f"{part!r} is neither a length of parts nor a list of their beginnings")
    if part[:1] != [0] or any(a >= b for a, b in itertools.pairwise([*part, size])):
        raise ValueError("beginnings of parts that do not rise from 0 within the shape")
    return tuple(part)
