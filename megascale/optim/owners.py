"""Work on whole matrices, distributed over the ranks that hold their pieces: one owner works on each and sends back pieces of the result.

Axis by axis the pieces are gathered on the owner's rank, all matrices of a turn in one all-to-all. With N ranks on an axis and matrices of
S bytes altogether, a rank sends 2(N−1)/N²·S if they are split, and (N−1)/N·S if every rank holds them whole and only results are sent.
Gathering everywhere would send (N−1)/N·S and repeat the work N times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from megascale.comm.exchange import start_rows, wait
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


def take_turns(
    weights: Sequence[Weight], mesh: Mesh, cost: Callable[[Weight], float], together: Callable[[Weight], int] = lambda w: 1
) -> list[list[Matrix]]:
    """Groups matrices into turns, most expensive first, so that those of a turn cost about the same. An owner has one in each, or as many
    as `together` allows for the first.
    """

    def kind(m: Matrix) -> tuple[tuple[str, bool], ...]:
        return tuple((step.axis.name, step.dim is None) for step in m.steps)

    matrices = sorted((Matrix(w, steps_to_whole(w, mesh)) for w in weights), key=lambda m: (kind(m), -cost(m.weight)))
    turns = []
    for _, alike in groupby(matrices, kind):
        group = list(alike)
        sizes = [step.axis.size for step in group[0].steps]
        owners, first = math.prod(sizes), 0
        while first < len(group):
            turn = group[first : first + owners * together(group[first].weight)]
            turns.append([Matrix(m.weight, m.steps, _coordinates(i % owners, sizes)) for i, m in enumerate(turn)])
            first += len(turn)
    return turns


def work_in_turns(
    turns: Sequence[Sequence[Matrix]],
    pieces: Callable[[Matrix], Tensor],
    work: Callable[[list[Tensor]], list[Tensor]],
    take: Callable[[Matrix, Tensor], None],
) -> None:
    """For every matrix, `take` gets this rank's piece of what `work` makes of the whole. Owners alone run `work`, on all their matrices of
    a turn; it keeps shapes. While a turn is worked on, the pieces of the next one are already on their way.
    """
    before: tuple[Sequence[Matrix], _Sharing] | None = None
    for turn in turns:
        now = turn, _Sharing(_share(turn, {i: pieces(m) for i, m in enumerate(turn)}, work, 0))
        now[1].advance()
        if before is not None:
            _take_all(*before, take)
        before = now
    if before is not None:
        _take_all(*before, take)


def _take_all(turn: Sequence[Matrix], sharing: _Sharing, take: Callable[[Matrix, Tensor], None]) -> None:
    while sharing.done is None:
        sharing.advance()
    for i, m in enumerate(turn):
        take(m, sharing.done[i])


# Pauses whenever an exchange has begun whose result is needed next. A rank that takes no part in it pauses, too: if it went on to its next
# exchange, that could overtake one of an earlier turn.
Pauses = Generator[None, None, dict[int, Tensor]]


class _Sharing:
    """The work of one turn, which goes on from pause to pause. `done`: its results, after the last."""

    def __init__(self, pauses: Pauses) -> None:
        self.pauses = pauses
        self.done: dict[int, Tensor] | None = None

    def advance(self) -> None:
        try:
            next(self.pauses)
        except StopIteration as end:
            self.done = end.value


def _share(turn: Sequence[Matrix], held: dict[int, Tensor], work: Callable[[list[Tensor]], list[Tensor]], level: int) -> Pauses:
    """{number in the turn: piece before step `level`} → the same for the results."""
    if not held:  # the last turn has fewer matrices than owners
        for step in turn[0].steps[level:]:
            yield from [None] * (1 if step.dim is None else 2)
        return {}
    if level == len(turn[0].steps):
        return dict(zip(held, work(list(held.values()))))
    wholes = yield from _share(turn, (yield from _collect(turn, held, level)), work, level + 1)
    return (yield from _spread(turn, wholes, held, level))


def _collect(turn: Sequence[Matrix], held: dict[int, Tensor], level: int) -> Pauses:
    """Gathers, along the axis of step `level`, the matrices that this rank owns there."""
    axis = turn[0].steps[level].axis
    mine = [i for i in held if turn[i].owner[level] == axis.rank]
    if turn[0].steps[level].dim is None:
        return {i: held[i] for i in mine}
    sent = [[x for i, x in held.items() if turn[i].owner[level] == rank] for rank in range(axis.size)]
    shapes = [[turn[i].steps[level].shape(held[i], rank) for i in mine] for rank in range(axis.size)]
    came = yield from _exchange(sent, shapes, axis, held)
    return {i: turn[i].steps[level].join([pieces[n] for pieces in came]) for n, i in enumerate(mine)}


def _spread(turn: Sequence[Matrix], wholes: dict[int, Tensor], held: dict[int, Tensor], level: int) -> Pauses:
    """The inverse of `_collect`: every rank gets its piece of what it `held` from the owners."""
    axis = turn[0].steps[level].axis
    sent = [[turn[i].steps[level].piece(whole, rank) for i, whole in wholes.items()] for rank in range(axis.size)]
    owned = [[i for i in held if turn[i].owner[level] == rank] for rank in range(axis.size)]
    came = yield from _exchange(sent, [[held[i].shape for i in numbers] for numbers in owned], axis, held)
    return {i: piece for numbers, pieces in zip(owned, came) for i, piece in zip(numbers, pieces)}


def _exchange(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Sequence[int]]], axis: Axis, like: dict[int, Tensor]
) -> Generator[None, None, list[list[Tensor]]]:
    """Sends `sent[i]` to rank i and returns tensors of `shapes[i]` from each rank i. One all-to-all, begun before the pause."""
    empty = next(iter(like.values())).new_empty(0)
    sizes = [[math.prod(shape) for shape in of_rank] for of_rank in shapes]
    send, receive = [sum(x.numel() for x in xs) for xs in sent], [sum(n) for n in sizes]
    coming = start_rows(torch.cat([empty, *(x.flatten() for xs in sent for x in xs)]), send, receive, axis, sum(receive))
    yield
    flat = wait(coming).split(receive)
    return [[x.view(*shape) for x, shape in zip(xs.split(n), of_rank)] for xs, n, of_rank in zip(flat, sizes, shapes)]


def _coordinates(number: int, sizes: Sequence[int]) -> tuple[int, ...]:
    place = []
    for size in reversed(sizes):
        number, at = divmod(number, size)
        place.append(at)
    return tuple(reversed(place))
