"""Auxiliary losses anywhere in a stack, such as a router's balance loss and z-loss.

A middle stage of a pipeline sends its stream on and never sees the final loss, so such a loss cannot be added to it. It rides on the stream
instead: an identity whose backward passes the stream's gradient through and starts the auxiliary loss's own with its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Ride(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: float, report: Callable[[Tensor], None]) -> Tensor:
        ctx.weight, ctx.report = weight, report
        ctx.save_for_backward(loss.detach())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (loss,) = ctx.saved_tensors
        ctx.report(loss)
        return grads[0], torch.full_like(loss, ctx.weight), None, None


def ride_on(x: Tensor, loss: Tensor, weight: float, report: Callable[[Tensor], None]) -> Tensor:
    """`x` unchanged; its backward adds `weight` times the gradient of the 0-dim `loss`.

    report  called with the loss once per micro-batch, from backward, since recomputation repeats forward
    """
    return _Ride.apply(x, loss, weight, report)  # type: ignore[no-any-return]
