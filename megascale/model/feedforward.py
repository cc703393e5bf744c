"""The feed-forward sublayer. Shapes: b micro-batch, s sequence, d hidden, f this rank's share of the width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.model.activations import activation
from megascale.model.attention import identity
from megascale.model.layers import Linear, Norm
from megascale.model.products import Product, product_of
from megascale.model.residual import Residual
from megascale.model.spec import Cut, Role


class FeedForward(nn.Module):
    """down(φ(up·x)), or down(φ(gate·x) ⊙ up·x) for SwiGLU and GEGLU (arXiv 2002.05202); the row may put a norm before `down`."""

    def __init__(self, cfg: Model, row: Residual, dtype: torch.dtype, width: int | None = None) -> None:
        super().__init__()
        d, f = cfg.hidden_size, width or cfg.ffn_size

        def product(out_dim: int, in_dim: int, role: Role, cut: Cut) -> Product:
            return product_of(cfg, row, out_dim, in_dim, role, cut, dtype, cfg.bias)

        self.activation = activation(cfg.ffn)
        self.up = product(f, d, "up", 0)
        self.gate: Product | None = product(f, d, "gate", 0) if cfg.gated else None
        self.down = product(d, f, "down", 1)
        self.inner_norm: Norm | None = None
        if row.scheme.inner_norms:
            self.inner_norm = Norm(f, cfg.norm, row.norm_eps["ffn_inner_norm"], 0, dtype, cfg.bias, cfg.dyt_alpha[1])
        self.enter: Callable[[Tensor], Tensor] = identity
        self.leave: Callable[[Tensor], Tensor] = identity

    def use(self, width: int | None) -> None:
        """Uses only the first `width` channels until the next call (MatFormer); None: all. Applies to both halves of a gate."""
        rows = None if width is None else (0, width)
        for part in (self.up, self.gate):
            if isinstance(part, Linear):
                part.rows = rows
        if isinstance(self.down, Linear):
            self.down.columns = width

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, d] → [b, s, d]"""
        x = self.enter(x)
        y = self.activation(self.up(x), None if self.gate is None else self.gate(x))
        if self.inner_norm is not None:
            y = self.inner_norm(y)
        return self.down.add_bias(self.leave(self.down.product(y)))
