"""Products whose weight gradient is computed later, for schedules that split the backward pass.

A product runs between `_Keep`, an identity on its input x, and `_Meet`, an identity on its result y. Backward through `_Keep` runs after
the product's and queues what the weight's gradient needs: x and the gradient of y. The latter comes from `_Meet` as the gradient of a
token: a tensor of y's shape, without memory of its own, that leads from `_Keep` to `_Meet`. It is all ordinary dataflow, so a compiler can
follow. A single node around the product would not do: recomputation, which stops at the last saved tensor, would repeat the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from megascale.handles import Listener, handle_of, telling

# Weight gradients still to be computed, in the order of the backward pass.
Deferred = list[Callable[[], None]]
# Settings of inductor for graphs that queue: otherwise it would write other results into memory that a queue still holds.
KEEPS_MEMORY = {"allow_buffer_reuse": False, "inplace_buffers": False}


class Defers(Listener, Protocol):
    """A layer with one product. `deferred` is its queue, `handle` its own; both None without a queue. It hears the gradient g of the
    product's result and its input x, and the counts [E] if its weight is a bank, and queues what adds the weight's gradient to it.
    """

    deferred: Deferred | None
    handle: Tensor | None


def defer(layer: Defers, queue: Deferred) -> None:
    """Makes a layer queue its weight gradients."""
    layer.deferred = queue
    if layer.handle is None:
        layer.handle = handle_of(layer)


def deferred_product(layer: Defers, x: Tensor, product: Callable[[Tensor], Tensor], width: int, counts: Tensor | None = None) -> Tensor:
    """`product` of x [..., in] → [..., width] with a detached weight; x must require a gradient, as every stream between layers does."""
    kept, token = _Keep.apply(x, layer.handle, counts, width)
    return _Meet.apply(product(kept), token)  # type: ignore[no-any-return]


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Tensor, counts: Tensor | None, width: int) -> Any:
        ctx.save_for_backward(x, layer, counts)
        return x.view_as(x), x.new_empty(()).expand(*x.shape[:-1], width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, layer, counts = ctx.saved_tensors
        into_x, g = grads
        return telling(into_x, layer, "", [g, x] if counts is None else [g, x, counts]), None, None, None


class _Meet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], grads[0]
