"""One block: attention, then feed-forward, each joined to the stream as the residual table says."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.model.attention import Attention
from megascale.model.attention_tiles import Seen
from megascale.model.feedforward import FeedForward
from megascale.model.kernels import NormKernel
from megascale.model.layers import Norm, dropout
from megascale.model.position import Rotary
from megascale.model.residual import Residual


class Context(NamedTuple):
    """What a block needs beside the stream: rotary angles, what tokens see (None: themselves and all before them), dropout keys [b, s] of
    the layer.
    """

    rotary: Rotary | None
    seen: Seen | None
    keys: Tensor | None


class Block(nn.Module):
    def __init__(self, cfg: Model, row: Residual, dtype: torch.dtype, norm_kernel: NormKernel) -> None:
        super().__init__()
        self.norm_first, self.dropout = row.norm_first, cfg.dropout
        self.attention_norm = Norm(cfg.hidden_size, cfg.norm, cfg.norm_eps, "tokens", dtype, norm_kernel, cfg.bias)
        self.attention = Attention(cfg, row.gains, dtype, norm_kernel)
        self.ffn_norm = Norm(cfg.hidden_size, cfg.norm, cfg.norm_eps, "tokens", dtype, norm_kernel, cfg.bias)
        self.ffn = FeedForward(cfg, row.gains, dtype)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [b, s, d] → [b, s, d]"""
        keys = context.keys
        x = self._join(x, self.attention_norm, lambda h: self.attention(h, context.rotary, context.seen), keys)
        return self._join(x, self.ffn_norm, self.ffn, None if keys is None else ~keys)

    def _join(self, x: Tensor, norm: Norm, branch: Callable[[Tensor], Tensor], keys: Tensor | None) -> Tensor:
        if self.norm_first:
            return x + dropout(branch(norm(x)), self.dropout, keys)
        return norm(x + dropout(branch(x), self.dropout, keys))
