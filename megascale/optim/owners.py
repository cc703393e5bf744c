"""Work on whole matrices, distributed over the ranks that hold their pieces: one owner works on each and sends back pieces of the result.

Axis by axis the pieces are gathered on the owner's rank, all matrices of a turn in one all-to-all. With N ranks on an axis and matrices of
S bytes altogether, a rank sends 2(N−1)/N²·S if they are split, and (N−1)/N·S if every rank holds them whole and only results are sent.
Gathering everywhere would send (N−1)/N·S and repeat the work N times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from megascale.comm.collectives import all_to_all
from megascale.comm.mesh import Axis, Mesh
from megascale.comm.piece import chunk_bounds
from megascale.parallel.model import Weight


@dataclass(frozen=True)
class GatherStep:
    """One axis between a rank's piece and the whole: split along `dim` of total `length`; None: replicated on all its ranks."""

    axis: Axis
    dim: int | None = None
    length: int = 0

    def piece(self, whole: Tensor, rank: int) -> Tensor:
        if self.dim is None:
            return whole
        first, last = chunk_bounds(self.length, self.axis.size, rank)
        return whole.narrow(self.dim, first, last - first)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        assert self.dim is not None
        return torch.cat(list(pieces), self.dim)

    def shape(self, piece: Tensor, rank: int) -> list[int]:
        """Shape of the piece of `rank`, given this rank's `piece`."""
        shape = list(piece.shape)
        if self.dim is not None:
            first, last = chunk_bounds(self.length, self.axis.size, rank)
            shape[self.dim] = last - first
        return shape


@dataclass(frozen=True)
class Matrix:
    """A weight, the steps from its piece to the whole, and the owner's rank at each step."""

    weight: Weight
    steps: tuple[GatherStep, ...]
    owner: tuple[int, ...] = ()


def steps_to_whole(w: Weight, mesh: Mesh) -> tuple[GatherStep, ...]:
    """Replicated axes first, since only one replica then needs to gather. Axes of size one are skipped.

    Each expert is a separate matrix and stays on its ep rank; with their own axes experts are replicated over dp_replicate only.
    """
    p, tp, own_axes = w.placement, mesh["tp"], w.placement.shard == "edp"
    steps = [GatherStep(mesh["dp_replicate"] if w.sharded or own_axes else mesh["replicas"])]
    cuts = [cut for cut in p.cuts if cut.axis == "tp"]
    if not cuts and not own_axes:
        steps.append(GatherStep(tp))
    if w.sharded:
        steps.append(GatherStep(mesh[p.shard], p.shard_dim, p.shape[p.shard_dim]))
    steps += [GatherStep(tp, cut.dim, cut.part * tp.size) for cut in cuts]
    return tuple(step for step in steps if step.axis.size > 1)


def take_turns(weights: Sequence[Weight], mesh: Mesh, cost: Callable[[Weight], float]) -> list[list[Matrix]]:
    """Groups matrices into turns with one per owner, most expensive first, so that those of a turn cost about the same."""

    def kind(m: Matrix) -> tuple[tuple[str, bool], ...]:
        return tuple((step.axis.name, step.dim is None) for step in m.steps)

    matrices = sorted((Matrix(w, steps_to_whole(w, mesh)) for w in weights), key=lambda m: (kind(m), -cost(m.weight)))
    turns = []
    for _, alike in groupby(matrices, kind):
        group = list(alike)
        sizes = [step.axis.size for step in group[0].steps]
        owners = math.prod(sizes)
        for first in range(0, len(group), owners):
            turn = group[first : first + owners]
            turns.append([Matrix(m.weight, m.steps, _coordinates(i, sizes)) for i, m in enumerate(turn)])
    return turns


def work_shared(turn: Sequence[Matrix], pieces: Sequence[Tensor], work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """`pieces` of the turn's matrices → this rank's pieces of `work`(matrix), which keeps the shape. Only the owner runs `work`."""
    done = _share(turn, dict(enumerate(pieces)), work, 0)
    return [done[i] for i in range(len(turn))]


def _share(turn: Sequence[Matrix], held: dict[int, Tensor], work: Callable[[Tensor], Tensor], level: int) -> dict[int, Tensor]:
    """{number in the turn: piece before step `level`} → the same for the results."""
    if not held:
        return {}  # the last turn has fewer matrices than owners
    if level == len(turn[0].steps):
        return {i: work(x) for i, x in held.items()}
    wholes = _share(turn, _collect(turn, held, level), work, level + 1)
    return _spread(turn, wholes, held, level)


def _collect(turn: Sequence[Matrix], held: dict[int, Tensor], level: int) -> dict[int, Tensor]:
    """Gathers, along the axis of step `level`, the matrices that this rank owns there."""
    axis = turn[0].steps[level].axis
    mine = [i for i in held if turn[i].owner[level] == axis.rank]
    if turn[0].steps[level].dim is None:
        return {i: held[i] for i in mine}
    sent = [[x for i, x in held.items() if turn[i].owner[level] == rank] for rank in range(axis.size)]
    shapes = [[turn[i].steps[level].shape(held[i], rank) for i in mine] for rank in range(axis.size)]
    came = _exchange(sent, shapes, axis, held)
    return {i: turn[i].steps[level].join([pieces[n] for pieces in came]) for n, i in enumerate(mine)}


def _spread(turn: Sequence[Matrix], wholes: dict[int, Tensor], held: dict[int, Tensor], level: int) -> dict[int, Tensor]:
    """The inverse of `_collect`: every rank gets its piece of what it `held` from the owners."""
    axis = turn[0].steps[level].axis
    sent = [[turn[i].steps[level].piece(whole, rank) for i, whole in wholes.items()] for rank in range(axis.size)]
    owned = [[i for i in held if turn[i].owner[level] == rank] for rank in range(axis.size)]
    came = _exchange(sent, [[held[i].shape for i in numbers] for numbers in owned], axis, held)
    return {i: piece for numbers, pieces in zip(owned, came) for i, piece in zip(numbers, pieces)}


def _exchange(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Sequence[int]]], axis: Axis, like: dict[int, Tensor]
) -> list[list[Tensor]]:
    """Sends `sent[i]` to rank i and returns tensors of `shapes[i]` from each rank i. One all-to-all."""
    empty = next(iter(like.values())).new_empty(0)
    sizes = [[math.prod(shape) for shape in of_rank] for of_rank in shapes]
    flat = all_to_all([torch.cat([empty, *(x.flatten() for x in xs)]) for xs in sent], [[sum(n)] for n in sizes], axis)
    return [[x.view(*shape) for x, shape in zip(xs.split(n), of_rank)] for xs, n, of_rank in zip(flat, sizes, shapes)]


def _coordinates(number: int, sizes: Sequence[int]) -> tuple[int, ...]:
    place = []
    for size in reversed(sizes):
        number, at = divmod(number, size)
        place.append(at)
    return tuple(reversed(place))
