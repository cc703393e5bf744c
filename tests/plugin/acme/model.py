"""Parts of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import softplus

from megascale.config.schema import Model
from megascale.model.residual import InitStd, Residual, Stack
from megascale.model.router import Choice, Scored


def l1_normalized(x: Tensor, mean: Callable[[Tensor], Tensor], eps: float) -> Tensor:
    return x / (mean(x.abs()) + eps)


def relu_squared(x: Tensor) -> Tensor:
    return x.relu().square()


def halves(cfg: Model, stack: Stack, layer: int) -> Residual:
    return Residual(cfg.residual_row, InitStd("xavier"), skip=math.sqrt(0.5), branch=math.sqrt(0.5))


def by_softplus(logits: Tensor) -> Scored:
    scores = softplus(logits)

    def choice(experts: Tensor) -> Choice:
        return Choice(experts, scores.gather(-1, experts), scores / scores.sum(-1, keepdim=True))

    return Scored(scores, choice)
