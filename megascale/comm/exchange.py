"""Exchanges of uneven numbers of rows between ranks that overlap with computation.

Counted bytes are those that leave the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.comm.graphs import outside_graphs
from megascale.comm.mesh import Axis


@dataclass
class Flight:
    """Rows in flight between the ranks of an axis: how many go to and come from each, the operation, and its output."""

    send: list[int]
    receive: list[int]
    axis: Axis
    work: dist.Work | None = None
    rows: Tensor | None = None

    def start(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        x = x.contiguous()
        self.rows = x.new_empty((sum(receive), *x.shape[1:]))
        if self.axis.size == 1:
            self.rows.copy_(x)
            return self.rows
        row = x[:1].nbytes if x.shape[0] else 0
        self.axis.traffic.add(self.axis.name, "all_to_all", row * (sum(send) - send[self.axis.rank]))
        self.work = dist.all_to_all_single(self.rows, x, receive, send, group=self.axis.group, async_op=True)
        return self.rows

    def land(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        assert self.rows is not None
        rows, self.work, self.rows = self.rows, None, None
        return rows


class _TakeOff(torch.autograd.Function):
    """Starts an exchange; its result is valid only after _Land. In backward, _Land starts the way back and this one waits for it: whatever
    ran between the two in forward also runs between them in backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.start(x, flight.send, flight.receive)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.flight.land(), None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.land()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        flight = ctx.flight
        flight.start(grads[0], flight.receive, flight.send)
        return grads[0], None


@outside_graphs
def start_exchange(x: Tensor, send: list[int], receive: list[int], axis: Axis) -> tuple[Tensor, Flight]:
    """Starts sending `send[r]` rows of x [n, …], in order, to each rank r; end it with `finish_exchange`."""
    flight = Flight(send, receive, axis)
    return _TakeOff.apply(x, flight), flight


@outside_graphs
def finish_exchange(rows: Tensor, flight: Flight) -> Tensor:
    """The received rows, `receive[r]` from each rank r, in rank order."""
    return _Land.apply(rows, flight)  # type: ignore[no-any-return]


def exchange_counts(counts: Tensor, axis: Axis) -> Tensor:
    """counts [N, …], row r for rank r → the rows that all ranks have for this one. Control data, so its bytes are not counted."""
    if axis.size == 1:
        return counts
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=axis.group)
    return received
