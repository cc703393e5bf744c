"""Exchanges of uneven numbers of rows between ranks that overlap with computation, in compiled graphs as well.

The operators refer to an axis by its handle (handles.py). `splits` [2, ranks], on the host, says how many rows go to each rank and how many
come from it. Counted bytes are those that leave the rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.comm.host import event_on
from megascale.comm.mesh import Axis
from megascale.handles import held

# By the address of a copy on the host, the event after which it is complete.
_copies: dict[int, Any] = {}


@torch.library.custom_op("megascale::exchange_counts", mutates_args=())
def exchange_counts(counts: Tensor, axis: Tensor) -> Tensor:
    """counts [N, …], row r for rank r → the rows that all ranks have for this one. Control data, so its bytes are not counted."""
    if held(axis).size == 1:
        return counts.clone()
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=held(axis).group)
    return received


@exchange_counts.register_fake
def _(counts: Tensor, axis: Tensor) -> Tensor:
    return torch.empty_like(counts)


@torch.library.custom_op("megascale::on_host", mutates_args=())
def on_host(x: Tensor) -> Tensor:
    """A copy on the host, which is not waited for here but by whoever reads it, with `rows_exchanged`."""
    if x.device.type == "cpu":
        return x.clone()
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    copy.copy_(x, non_blocking=True)
    _copies[copy.data_ptr()] = event_on(x.device)
    return copy


@on_host.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu")


def rows_exchanged(splits: Tensor, rows: int) -> list[list[int]]:
    """How many of `rows` rows go to each rank, and how many come from it, from `splits`. The host must know, to allocate what comes."""
    if (event := _copies.pop(splits.data_ptr(), None)) is not None:
        event.synchronize()
    return splits.tolist()  # type: ignore[no-any-return]


@torch.library.custom_op("megascale::first_rows", mutates_args=())
def first_rows(x: Tensor, count: Tensor, expected: int) -> Tensor:
    """The first rows of x, one more than `count` [1, 1] on the host, if there are so many. `expected`: the count of an even load."""
    return x[: rows_exchanged(count, expected)[0][0] + 1].clone()


@first_rows.register_fake
def _(x: Tensor, count: Tensor, expected: int) -> Tensor:
    return x.new_empty((torch.library.get_ctx().new_dynamic_size(), *x.shape[1:]))


@torch.library.custom_op("megascale::send_rows", mutates_args=())
def send_rows(x: Tensor, splits: Tensor, axis: Tensor) -> Tensor:
    """Starts sending rows of x [n, …], in order, to the ranks of an axis; `wait` makes the result valid. The host waits for `splits`."""
    send, receive = rows_exchanged(splits, x.shape[0])
    return start_rows(x, send, receive, held(axis), sum(receive))


@send_rows.register_fake
def _(x: Tensor, splits: Tensor, axis: Tensor) -> Tensor:
    return x.new_empty((torch.library.get_ctx().new_dynamic_size(), *x.shape[1:]))


@torch.library.custom_op("megascale::move_rows", mutates_args=())
def move_rows(x: Tensor, splits: Tensor, axis: Tensor, back: bool, rows: int) -> Tensor:
    """`send_rows` or the way back, once the number of resulting `rows` is known; those beyond what comes are zero."""
    send, receive = reversed(rows_exchanged(splits, x.shape[0])) if back else rows_exchanged(splits, x.shape[0])
    return start_rows(x, send, receive, held(axis), rows)


@move_rows.register_fake
def _(x: Tensor, splits: Tensor, axis: Tensor, back: bool, rows: int) -> Tensor:
    return x.new_empty((rows, *x.shape[1:]))


def start_rows(x: Tensor, send: list[int], receive: list[int], axis: Axis, rows: int) -> Tensor:
    """Starts to send `send[r]` rows of x [n, …], in order, to each rank r, and to receive `receive[r]` from it, into new memory for `rows`
    that is valid after `wait`: torch knows the operation in flight.
    """
    out, going, coming = x.new_empty((rows, *x.shape[1:])), sum(send), sum(receive)
    out[coming:].zero_()
    if axis.size == 1:
        out[:coming].copy_(x[:going])
        return out
    row = x[:1].nbytes if going else 0
    axis.traffic.add(axis.name, "all_to_all", row * (going - send[axis.rank]))
    work = dist.all_to_all_single(out[:coming], x[:going].contiguous(), receive, send, group=axis.group, async_op=True)
    in_flight(out, work)
    if axis.traffic.started is not None:
        axis.traffic.started()
    return out


def in_flight(x: Tensor, work: Any) -> None:
    """Tells torch of the operation that writes x, for `wait`."""
    torch._C._distributed_c10d._register_work(x, work)


def wait(x: Tensor) -> Tensor:
    """x, once what is in flight into it has arrived."""
    return torch.ops._c10d_functional.wait_tensor(x)  # type: ignore[no-any-return]


class _TakeOff(torch.autograd.Function):
    """Starts an exchange; its result is valid only after _Land. In backward, _Land starts the way back and this one waits for it: whatever
    ran between the two in forward also runs between them in backward. What travels back is the gradient of a token: a tensor of x's shape,
    without memory of its own, that leads from here to _Land.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, splits: Tensor, axis: Tensor, back: bool, rows: int | None) -> Any:
        ctx.set_materialize_grads(False)
        out = send_rows(x, splits, axis) if rows is None else move_rows(x, splits, axis, back, rows)
        return out, x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return wait(grads[1]), None, None, None, None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, splits: Tensor, axis: Tensor, back: bool) -> Tensor:
        ctx.save_for_backward(splits, axis)
        ctx.back, ctx.rows = back, token.shape[0]
        return wait(rows).view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        splits, axis = ctx.saved_tensors
        return None, move_rows(grads[0], splits, axis, not ctx.back, ctx.rows), None, None, None


class Flight:
    """Rows of x [n, …] in flight between the ranks of an axis, or `back` to where they came from, of which there are `rows` then."""

    def __init__(self, x: Tensor, splits: Tensor, axis: Tensor, back: bool = False, rows: int | None = None) -> None:
        self.splits, self.axis, self.back = splits, axis, back
        self.travelling, self.token = _TakeOff.apply(x, splits, axis, back, rows)

    def land(self) -> Tensor:
        return _Land.apply(self.travelling, self.token, self.splits, self.axis, self.back)  # type: ignore[no-any-return]
