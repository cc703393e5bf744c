"""Parts of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megascale.config.schema import Model
from megascale.model.attention import Attention
from megascale.model.products import product_of
from megascale.model.residual import InitStd, Residual, Stack
from megascale.model.router import Choice, Scored


def l1_normalized(x: Tensor, mean: Callable[[Tensor], Tensor], eps: float) -> Tensor:
    return x / (mean(x.abs()) + eps)


def relu_squared(x: Tensor) -> Tensor:
    return x.relu().square()


def halves(cfg: Model, stack: Stack, layer: int) -> Residual:
    return Residual(cfg.residual_row, InitStd("xavier"), skip=math.sqrt(0.5), branch=math.sqrt(0.5))


class GatedAttention(Attention):
    def __init__(self, cfg: Model, row: Residual, dtype: torch.dtype, causal: bool) -> None:
        super().__init__(cfg, row, dtype, causal)
        self.gate = product_of(cfg, row, cfg.num_heads * cfg.head_dim, cfg.hidden_size, "gate", 0, dtype, False)

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return super().output(y * torch.sigmoid(self.gate(x)), x)


def by_softplus(logits: Tensor) -> Scored:
    scores = torch.nn.functional.softplus(logits)
    return Scored(scores, lambda experts: Choice(experts, scores.gather(-1, experts), scores / scores.sum(-1, keepdim=True)))
