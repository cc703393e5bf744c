"""BitLinear (b1.58, arXiv 2310.11453 and 2402.17764): products of weights −1, 0, 1 with 8-bit inputs, trained through the rounding.

Functions of one weight and one input. If these are split over ranks, `Statistics` combines the parts' statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EPS = 1e-5


def _same(x: Tensor) -> Tensor:
    return x


@dataclass
class Statistics:
    """Combines a rank's partial statistics; set by the tensor pass.

    weight_mean    mean |w| of this rank's equal part [] → of the whole weight
    input_mean     mean square of this rank's equal share of the features [..., 1] → of all, with gradients
    input_max      the largest |x| likewise, without
    """

    weight_mean: Callable[[Tensor], Tensor] = _same
    input_mean: Callable[[Tensor], Tensor] = _same
    input_max: Callable[[Tensor], Tensor] = _same


class _Through(torch.autograd.Function):
    """The rounded value forward, its gradient to the unrounded one backward (straight-through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def quantized_input(x: Tensor, statistics: Statistics) -> Tensor:
    """x [..., in] RMS-normalized, then clamp(round(127·x/max|x|), −128, 127)·max|x|/127 with the largest entry of each token."""
    x = x * torch.rsqrt(statistics.input_mean(x.square().mean(-1, keepdim=True)) + EPS)
    with torch.no_grad():
        step = statistics.input_max(x.abs().amax(-1, keepdim=True)).clamp(min=EPS) / 127
        rounded = (x / step).round().clamp(-128, 127) * step
    return _Through.apply(x, rounded)  # type: ignore[no-any-return]


def quantized_weight(w: Tensor, statistics: Statistics) -> Tensor:
    """w [out, in] → clamp(round(w/mean|w|), −1, 1)·mean|w|."""
    with torch.no_grad():
        size = statistics.weight_mean(w.abs().mean()).clamp(min=EPS)
        rounded = (w / size).round().clamp(-1, 1) * size
    return _Through.apply(w, rounded)  # type: ignore[no-any-return]
