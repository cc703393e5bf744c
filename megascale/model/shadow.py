"""Weights that are also kept in the compute dtype, so that a product does not cast them again.

Where nothing is gathered, a product of a bf16 model casts its fp32 weight: in forward, in backward if the compiler repeats it, in
recomputation, for every micro-batch. A shadow is that cast, made once after the weight has changed (parallel/shadows.py). The gradient goes
to the weight itself, widened as the cast's would be, so all numbers are the same.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Shadowed(Protocol):
    """A layer with one weight, and its shadow if it has one."""

    weight: Any
    shadow: Tensor | None


def product_weight(layer: Shadowed) -> Tensor:
    """The weight as a product takes it: its shadow, whose gradient is the weight's, or the weight."""
    if layer.shadow is None:
        return layer.weight  # type: ignore[no-any-return]
    return _Shadow.apply(layer.weight, layer.shadow)  # type: ignore[no-any-return]


class _Shadow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, shadow: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return shadow.view_as(shadow)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].to(ctx.dtype), None
