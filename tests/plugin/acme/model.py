"""Parts of blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def l1_normalized(x: Tensor, mean: Callable[[Tensor], Tensor], eps: float) -> Tensor:
    return x / (mean(x.abs()) + eps)


def relu_squared(x: Tensor) -> Tensor:
    return x.relu().square()
