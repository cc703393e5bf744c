"""Expert parallelism whose host never waits: rows travel in a fixed number of rounds of a fixed size.

The host must know an exchange's sizes, and how many rows a rank's experts get is known on the device only. Here each rank sends every other
one the same number of rows in a round, filled up with zeros, and there are as many rounds as all rows to one rank would need. So no row is
dropped, results are those of the exact exchange, and nothing depends on numbers that the host does not have; what it costs is bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megascale.comm.exchange import Flight, exchange_counts
from megascale.comm.mesh import Axis
from megascale.model.experts import Arrival, Departure
from megascale.model.ops.grouped_matmul import pick, places


def room_of(rows: int, ranks: int, factor: float) -> int:
    """Rows for each rank in a round, if one has room for `factor` times those of an even load."""
    return max(1, min(rows, math.ceil(rows * factor / ranks)))


def bounded_dispatch(counts: Tensor, axis: Axis, handle: Tensor, factor: float) -> Departure:
    """`dispatch` in rounds."""
    mine = counts.view(axis.size, -1)
    here = exchange_counts(mine, handle)  # [ranks, experts here]

    def depart(rows: Tensor) -> list[Arrival]:
        room = room_of(rows.shape[0], axis.size, factor)
        return [_round(rows, mine.sum(1), here, room, i * room, axis.size, handle) for i in range(-(-rows.shape[0] // room))]

    return depart


def _round(rows: Tensor, sent: Tensor, here: Tensor, room: int, first: int, ranks: int, handle: Tensor) -> Arrival:
    """The exchange of the rows from the `first` on, of those for each rank: `sent` [ranks] by this one, `here` [ranks, experts] by them."""
    slots, size = torch.full((2, ranks), room, device="cpu"), ranks * room
    begins = torch.arange(ranks, device=here.device) * room
    going = _within(sent.unsqueeze(1), first, room).squeeze(1)
    gathered, scattered = places(going, sent.cumsum(0) - sent + first, begins, rows.shape[0], size)
    coming = _within(here, first, room)
    of_expert = coming.t().flatten()
    begins = (begins.unsqueeze(1) + coming.cumsum(1) - coming).t().flatten()
    order, inverse = places(of_expert, begins, of_expert.cumsum(0) - of_expert, size, size)

    def start() -> Flight:
        return Flight(pick(rows, gathered, scattered), slots, handle, False, size)

    begun = start() if first == 0 else None  # a later round only when it is needed: one at a time is in memory

    def wait() -> tuple[Tensor, Tensor]:
        return pick((begun or start()).land(), order, inverse), coming.sum(0)

    def back(results: Tensor) -> Tensor:
        return pick(Flight(pick(results, inverse, order), slots, handle, True, size).land(), scattered, gathered)

    return Arrival(wait, back)


def _within(counts: Tensor, first: int, room: int) -> Tensor:
    """How many of each block's rows, counts [ranks, blocks], are among the `room` from the `first` on of a rank's."""
    ends = counts.cumsum(1)
    return (ends - first).clamp(0, room) - (ends - counts - first).clamp(0, room)
