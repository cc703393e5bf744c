"""Parts of blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import softplus

from megascale.model.router import Choice, Scored


def l1_normalized(x: Tensor, mean: Callable[[Tensor], Tensor], eps: float) -> Tensor:
    return x / (mean(x.abs()) + eps)


def relu_squared(x: Tensor) -> Tensor:
    return x.relu().square()


def by_softplus(logits: Tensor) -> Scored:
    scores = softplus(logits)

    def choice(experts: Tensor) -> Choice:
        return Choice(experts, scores.gather(-1, experts), scores / scores.sum(-1, keepdim=True))

    return Scored(scores, choice)
