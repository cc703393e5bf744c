"""Auxiliary losses anywhere in a stack, such as a router's balance loss and z-loss.

A middle stage of a pipeline sends its stream on and never sees the final loss, so such a loss cannot be added to it. It rides on the stream
instead: an identity whose backward passes the stream's gradient through and starts the auxiliary loss's own with its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megascale.handles import telling


class _Ride(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: float, handle: Tensor | None, *values: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(loss.detach(), handle, *values)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        loss, handle, *values = ctx.saved_tensors
        into_loss = torch.full_like(loss, ctx.weight)
        if handle is not None:
            into_loss = telling(into_loss, handle, "", values)
        return grads[0], into_loss, None, None, *[None] * len(values)


def ride_on(x: Tensor, loss: Tensor, weight: float, to: Tensor | None = None, values: Sequence[Tensor] = ()) -> Tensor:
    """`x` unchanged; its backward adds `weight` times the gradient of the 0-dim `loss`.

    to  the handle (handles.py) of what hears `values`: once per micro-batch, from backward, since recomputation repeats forward
    """
    return _Ride.apply(x, loss, weight, to, *values)  # type: ignore[no-any-return]
