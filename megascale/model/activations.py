"""What stands between the products of a feed-forward. The rows are in config/activations.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from megascale.config.activations import activations
from megascale.plugins import resolve


@dataclass(frozen=True)
class Activation:
    phi: Callable[[Tensor], Tensor]

    def __call__(self, y: Tensor, gate: Tensor | None = None) -> Tensor:
        """φ(y), or φ(gate) ⊙ y where there is a gate."""
        return self.phi(y) if gate is None else self.phi(gate) * y


def activation(name: str) -> Activation:
    """What `model.ffn` says. Raises UsageError for a row of a plugin whose function cannot be imported."""
    return Activation(resolve(activations()[name].phi, f"the activation {name}"))


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
