"""Products whose weight gradient is computed later, for schedules that split the backward pass.

A product runs between `_Keep`, an identity on its input x, and `_Meet`, an identity on its result y. Backward through `_Keep` runs after
the product's and queues what the weight's gradient needs: x and the gradient of y. The latter comes from `_Meet` as the gradient of a
token: a tensor of y's shape, without memory of its own, that leads from `_Keep` to `_Meet`. It is all ordinary dataflow, so a compiler can
follow. A single node around the product would not do: recomputation, which stops at the last saved tensor, would repeat the product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from megascale.handles import handle_of, held

# Weight gradients still to be computed, in the order of the backward pass.
Deferred = list[Callable[[], None]]
# Settings of inductor for graphs that queue: otherwise it would write other results into memory that a queue still holds.
KEEPS_MEMORY = {"allow_buffer_reuse": False, "inplace_buffers": False}


class Defers(Protocol):
    """A layer with one product. `deferred` is its queue, `handle` its number in graphs; both None without a queue."""

    deferred: Deferred | None
    handle: Tensor | None

    def add_gradient(self, g: Tensor, x: Tensor, counts: Tensor | None, rows: slice) -> None:
        """Adds the weight's gradient from the gradient g of the product's result and its input x."""


def defer(layer: Defers, queue: Deferred) -> None:
    """Makes a layer queue its weight gradients."""
    layer.deferred = queue
    if layer.handle is None:
        layer.handle = handle_of(layer)


def deferred_product(
    layer: Defers, x: Tensor, product: Callable[[Tensor], Tensor], width: int, counts: Tensor | None = None, rows: slice = slice(None)
) -> Tensor:
    """`product` of x [..., in] → [..., width] with a detached weight; x must require a gradient, as every stream between layers does.

    counts  [E] rows of each expert, if the weight is a bank
    rows    the part of the weight that is used
    """
    kept, token = _Keep.apply(x, layer.handle, counts, rows.start or 0, -1 if rows.stop is None else rows.stop, width)
    return _Meet.apply(product(kept), token)  # type: ignore[no-any-return]


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: Tensor, counts: Tensor | None, begin: int, end: int, width: int) -> Any:
        ctx.save_for_backward(x, handle, counts)
        ctx.rows = begin, end
        return x.view_as(x), x.new_empty(()).expand(*x.shape[:-1], width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, handle, counts = ctx.saved_tensors
        into_x, g = grads
        if torch.compiler.is_compiling():
            # A graph drops what changes nothing, so the operator says that it changes a zero on which the result depends.
            zero = into_x.new_zeros(())
            queue_weight_gradient(zero, g, x, counts, handle, *ctx.rows)
            into_x = into_x + zero
        else:
            _queue(g, x, counts, handle, *ctx.rows)
        return into_x, None, None, None, None, None


class _Meet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], grads[0]


def _queue(g: Tensor, x: Tensor, counts: Tensor | None, handle: Tensor, begin: int, end: int) -> None:
    layer: Defers = held(handle)
    assert layer.deferred is not None
    layer.deferred.append(partial(layer.add_gradient, g, x, counts, slice(begin, None if end < 0 else end)))


@torch.library.custom_op("megascale::queue_weight_gradient", mutates_args={"zero"})
def queue_weight_gradient(zero: Tensor, g: Tensor, x: Tensor, counts: Tensor | None, handle: Tensor, begin: int, end: int) -> None:
    """`_queue` in a graph."""
    _queue(g, x, counts, handle, begin, end)


@queue_weight_gradient.register_fake
def _(zero: Tensor, g: Tensor, x: Tensor, counts: Tensor | None, handle: Tensor, begin: int, end: int) -> None:
    return None
