"""The functions between the products of a feed-forward. The rows are in config/activations.py."""

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
        """φ(y), or φ(gate) ⊙ y with a gate."""
        return self.phi(y) if gate is None else self.phi(gate) * y


def activation(name: str) -> Activation:
    """The activation of `model.ffn`. Raises UsageError for a plugin's row whose function cannot be imported."""
    return Activation(resolve(activations()[name].phi, f"the activation {name}"))


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
