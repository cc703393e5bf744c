"""Collectives that count the bytes they send, plain and as autograd functions.

Counting follows the ring algorithm: an all-gather or reduce-scatter over N ranks sends (N−1)/N of the whole tensor from each rank, an
all-reduce twice that; an all-to-all and a message count the bytes that leave the rank. Inside a compiled graph the same functions call
torch's functional collectives, and comm/functional.py counts. Messages along a ring stay outside graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.comm import functional
from megascale.comm.mesh import Axis

# torch 2.13 renamed these two and warns about the old names, the only ones in 2.11 and 2.12.
gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter_into: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def all_reduce(x: Tensor, axis: Axis, operation: str = "sum") -> Tensor:
    """Sum or max over the axis, in place where x is contiguous; returns the result."""
    if axis.size == 1:
        return x
    if torch.compiler.is_compiling():
        return functional.all_reduce(x.contiguous(), axis, operation)
    x = x.contiguous()
    axis.traffic.add(axis.name, "all_reduce", 2 * x.nbytes * (axis.size - 1) // axis.size)
    dist.all_reduce(x, _OPERATIONS[operation], group=axis.group)
    return x


def all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Equal pieces of all ranks joined along `dim`, contiguous. One copy, or none if `dim` is the first one longer than one."""
    if axis.size == 1:
        return x
    if math.prod(x.shape[:dim]) == 1:
        return _gather_first(x.flatten(0, dim), axis).unflatten(0, (*x.shape[:dim], axis.size * x.shape[dim]))
    return torch.cat(_gather_first(x, axis).chunk(axis.size), dim)


def _gather_first(x: Tensor, axis: Axis) -> Tensor:
    """Pieces [n, …] of all ranks → [ranks·n, …]."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        return functional.all_gather(x, axis)
    out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
    axis.traffic.add(axis.name, "all_gather", x.nbytes * (axis.size - 1))
    gather_into(out, x, group=axis.group)
    return out


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The sum over ranks, of which this rank keeps its piece along `dim` (a multiple of the axis size), contiguous. Copies as above."""
    if axis.size == 1:
        return x
    if math.prod(x.shape[:dim]) == 1:
        return _scatter_first(x.flatten(0, dim), axis).unflatten(0, (*x.shape[:dim], x.shape[dim] // axis.size))
    return _scatter_first(torch.cat(x.chunk(axis.size, dim)), axis)


def _scatter_first(x: Tensor, axis: Axis) -> Tensor:
    """[ranks·n, …] on all ranks → this rank's piece [n, …] of the sum."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        return functional.reduce_scatter(x, axis)
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    axis.traffic.add(axis.name, "reduce_scatter", out.nbytes * (axis.size - 1))
    scatter_into(out, x, group=axis.group)
    return out


def local_part(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's equal piece of a replicated tensor."""
    return x.chunk(axis.size, dim)[axis.rank] if axis.size > 1 else x


def all_to_all(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], axis: Axis) -> list[Tensor]:
    """Sends `parts[i]` to rank i; returns the tensor of `shapes[i]` received from each rank i. Sizes may differ, without padding."""
    flat = torch.cat([p.reshape(-1) for p in parts])
    sizes, sent = [math.prod(shape) for shape in shapes], [p.numel() for p in parts]
    if torch.compiler.is_compiling():
        out = functional.all_to_all(flat, sizes, sent, axis)
    else:
        out = flat.new_empty(sum(sizes))
        axis.traffic.add(axis.name, "all_to_all", flat.nbytes - parts[axis.rank].nbytes)
        dist.all_to_all_single(out, flat, sizes, sent, group=axis.group)
    return [x.view(*shape) for x, shape in zip(out.split(sizes), shapes)]


@dataclass
class Passing:
    """A block in flight to the next rank, and the one coming from the previous rank. `sent` must stay alive until `wait`."""

    works: list[dist.Work]
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


def pass_on(x: Tensor, shape: Sequence[int], axis: Axis) -> Passing:
    """Starts sending `x` to the next rank of the ring and receiving a tensor of `shape` from the previous one."""
    assert axis.group is not None
    x = x.contiguous()
    buffer = x.new_empty(*shape)
    after, before = (dist.get_global_rank(axis.group, (axis.rank + step) % axis.size) for step in (1, -1))
    axis.traffic.add(axis.name, "send", x.nbytes)
    pair = [dist.P2POp(dist.isend, x, after, axis.group), dist.P2POp(dist.irecv, buffer, before, axis.group)]
    return Passing(dist.batch_isend_irecv(pair), x, buffer)


def _summed(x: Tensor, axis: Axis, fresh: bool) -> Tensor:
    """The sum over the axis; in place if x is `fresh`, that is if nobody else uses it."""
    if torch.compiler.is_compiling() or (fresh and x.is_contiguous() and not x._is_view()):
        return all_reduce(x, axis)
    return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, fresh: bool) -> Tensor:
        ctx.axis, ctx.fresh = axis, fresh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _summed(grads[0], ctx.axis, ctx.fresh), None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, fresh: bool) -> Tensor:
        total = _summed(x, axis, fresh and not (x.requires_grad and x.is_leaf))
        if total is x:
            ctx.mark_dirty(x)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return reduce_scatter(grads[0], ctx.axis, ctx.dim), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return reduce_scatter(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_gather(grads[0], ctx.axis, ctx.dim), None, None


class _Switch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, cut: int, parts: Sequence[int], join: int, lengths: Sequence[int]) -> Tensor:
        ctx.arguments = axis, join, lengths, cut, parts
        shapes = []
        for length in lengths:
            shape = list(x.shape)
            shape[cut], shape[join] = parts[axis.rank], length
            shapes.append(shape)
        return torch.cat(all_to_all(x.split(list(parts), cut), shapes, axis), join)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Switch.apply(grads[0], *ctx.arguments), None, None, None, None, None


def switch(x: Tensor, axis: Axis, cut: int, parts: Sequence[int], join: int, lengths: Sequence[int]) -> Tensor:
    """Whole along `cut` and sharded along `join` → sharded along `cut` and whole along `join`, in one all-to-all; backward switches back.

    parts    how much of `cut` every rank gets; their sum is its length
    lengths  how much of `join` every rank has
    """
    return x if axis.size == 1 else _Switch.apply(x, axis, cut, parts, join, lengths)  # type: ignore[no-any-return]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, lengths: Sequence[int]) -> Tensor:
        ctx.arguments = axis, dim, lengths
        return x.split(list(lengths), dim)[axis.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _GatherUnequal.apply(grads[0], *ctx.arguments), None, None, None


class _GatherUnequal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, lengths: Sequence[int]) -> Tensor:
        ctx.arguments = axis, dim, lengths
        shapes = [(*x.shape[:dim], length, *x.shape[dim + 1 :]) for length in lengths]
        return torch.cat(all_to_all([x] * axis.size, shapes, axis), dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Split.apply(grads[0], *ctx.arguments), None, None, None


def split_unequal(x: Tensor, axis: Axis, dim: int, lengths: Sequence[int]) -> Tensor:
    """This rank's part, `lengths[rank]` long along `dim`, of a replicated tensor; backward joins the parts' gradients."""
    return x if axis.size == 1 else _Split.apply(x, axis, dim, lengths)  # type: ignore[no-any-return]


def gather_unequal(x: Tensor, axis: Axis, dim: int, lengths: Sequence[int]) -> Tensor:
    """Joins parts of `lengths` along `dim`, for identical use on all ranks; backward takes this rank's part of the equal gradients."""
    return x if axis.size == 1 else _GatherUnequal.apply(x, axis, dim, lengths)  # type: ignore[no-any-return]


def copy_to_ranks(x: Tensor, axis: Axis, fresh: bool = False) -> Tensor:
    """The same tensor on all ranks, each using it differently: identity forward, gradients summed backward. `fresh`: the gradient belongs
    to nobody else, as that of products does.
    """
    return _Copy.apply(x, axis, fresh)  # type: ignore[no-any-return]


def sum_over_ranks(x: Tensor, axis: Axis, fresh: bool = False) -> Tensor:
    """Partial results summed forward, in place if x is `fresh`; every rank's gradient is the same and passes through."""
    return _Reduce.apply(x, axis, fresh)  # type: ignore[no-any-return]


def share_sum(x: Tensor, axis: Axis) -> Tensor:
    """Partial results summed forward, each rank using the sum differently: gradients are summed backward too."""
    return copy_to_ranks(sum_over_ranks(x, axis), axis)


def max_over_ranks(x: Tensor, axis: Axis) -> Tensor:
    """The maximum over all ranks; it has no gradient."""
    return all_reduce(x.detach().clone(), axis, "max")


def gather_parts(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Pieces along `dim` joined forward; backward each rank gets its piece of the summed gradient."""
    return _Gather.apply(x, axis, dim)  # type: ignore[no-any-return]


def scatter_sum(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Partial results summed, each rank keeping its piece along `dim`; backward joins the pieces' gradients."""
    return _ScatterSum.apply(x, axis, dim)  # type: ignore[no-any-return]
