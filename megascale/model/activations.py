"""The functions between the products of a feed-forward. The rows are in config/activations.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.config.activations import activations
from megascale.plugins import resolve


@dataclass(frozen=True)
class Activation:
    phi: Callable[[Tensor], Tensor]
    psi: Callable[[Tensor], Tensor] | None = None

    def __call__(self, y: Tensor, gate: Tensor | None = None) -> Tensor:
        """φ(y), or φ(gate) ⊙ ψ(y) with a gate."""
        if gate is None:
            return self.phi(y)
        return self.phi(gate) * (y if self.psi is None else self.psi(y))


def activation(name: str) -> Activation:
    """The activation of `model.ffn`. Raises UsageError for a plugin's row whose function cannot be imported."""
    row, what = activations()[name], f"the activation {name}"
    return Activation(resolve(row.phi, what), None if row.psi is None else resolve(row.psi, what))


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


LIMIT = 7.0  # of GPT-OSS, and the slope of its sigmoid
SLOPE = 1.702


def clamped_swish(x: Tensor) -> Tensor:
    """GPT-OSS's gate: x·σ(1.702·x) of x up to 7."""
    x = x.clamp(max=LIMIT)
    return x * torch.sigmoid(SLOPE * x)


def clamped_plus_one(x: Tensor) -> Tensor:
    """GPT-OSS's other factor: x between −7 and 7, plus one."""
    return x.clamp(-LIMIT, LIMIT) + 1.0
