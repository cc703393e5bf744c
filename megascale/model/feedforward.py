"""The feed-forward sublayer: SwiGLU, GELU or ReLU. Shapes: b micro-batch, s sequence, d hidden, f this rank's share of the width."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.model.attention import identity
from megascale.model.layers import Linear
from megascale.model.residual import Gains


def activate(kind: str, y: Tensor, gate: Tensor | None) -> Tensor:
    """silu(gate) ⊙ y where there is a gate, else GELU or ReLU of y."""
    if gate is not None:
        return F.silu(gate) * y
    return F.gelu(y) if kind == "gelu" else F.relu(y)


class FeedForward(nn.Module):
    """down(φ(up·x)), or down(silu(gate·x) ⊙ up·x) for SwiGLU (arXiv 2002.05202)."""

    def __init__(self, cfg: Model, gains: Gains, dtype: torch.dtype, width: int | None = None) -> None:
        super().__init__()
        assert cfg.ffn_size
        d, f, std = cfg.hidden_size, width or cfg.ffn_size, cfg.init_std
        self.kind = cfg.ffn
        self.up = Linear(f, d, "up", 0, std * gains.up, dtype, cfg.bias)
        self.gate = Linear(f, d, "gate", 0, std * gains.gate, dtype, cfg.bias) if cfg.ffn == "swiglu" else None
        self.down = Linear(d, f, "down", 1, std * gains.down, dtype, cfg.bias)
        self.enter: Callable[[Tensor], Tensor] = identity
        self.leave: Callable[[Tensor], Tensor] = identity

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, d] → [b, s, d]"""
        x = self.enter(x)
        y = activate(self.kind, self.up(x), None if self.gate is None else self.gate(x))
        return self.down.add_bias(self.leave(self.down.product(y)))
