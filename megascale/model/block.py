"""One block: attention, then feed-forward, each joined to the stream as its row of the residual table says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.model.attention import Attention
from megascale.model.attention_tiles import Seen
from megascale.model.experts import MixtureOfExperts
from megascale.model.feedforward import FeedForward
from megascale.model.kernels import NormKernel
from megascale.model.layers import Norm, dropout
from megascale.model.position import Rotary
from megascale.model.residual import Residual
from megascale.model.spec import ParamSpec, declare, declare_state


class Context(NamedTuple):
    """What a block needs beside the stream: rotary angles, what tokens see (None: themselves and all before them, or all where attention
    is not causal), dropout keys [b, s] of the layer, the factor [1] on every branch that follows the global step (None: no scheme with
    one), and the weight [b, s] of each token in auxiliary losses (None: there are none).
    """

    rotary: Rotary | None
    seen: Seen | None
    keys: Tensor | None
    branch: Tensor | None
    counted: Tensor | None


class Block(nn.Module):
    """Coefficients of the row are checkpoint state, one pair a layer, so that a layer keeps its own when the stack grows."""

    skip: Tensor | None
    branch: Tensor | None

    def __init__(self, cfg: Model, row: Residual, dtype: torch.dtype, norm_kernel: NormKernel, sparse: bool) -> None:
        super().__init__()
        self.row, self.dropout, d = row, cfg.dropout, cfg.hidden_size
        bias = cfg.bias and "norm" not in row.unbiased
        eps = row.norm_eps
        self.attention_norm = Norm(d, cfg.norm, eps["attention_norm"], "tokens", dtype, norm_kernel, bias, cfg.dyt_alpha[0])
        self.attention = Attention(cfg, row, dtype, norm_kernel)
        self.ffn_norm: Norm | None = None
        if not row.one_norm:
            self.ffn_norm = Norm(d, cfg.norm, eps["ffn_norm"], "tokens", dtype, norm_kernel, bias, cfg.dyt_alpha[1])
        self.ffn = MixtureOfExperts(cfg, row, dtype, norm_kernel) if sparse else FeedForward(cfg, row, dtype, norm_kernel)
        self.attention_scale = self._channel_scale(d, dtype)
        self.ffn_scale = self._channel_scale(d, dtype)
        # In bf16 a λ of 0.9995 would round to 1, and a thousand layers would not notice their own factor.
        exact = torch.promote_types(dtype, torch.float32)
        for name, value in (("skip", row.skip), ("branch", row.branch)):
            if value == 1.0:
                self.register_buffer(name, None)
            else:
                declare_state(self, name, ParamSpec((1,), "coefficient", "tokens", mean=value), exact)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [b, s, d] → [b, s, d]"""
        keys = context.keys
        other_keys = None if keys is None else ~keys
        attention = lambda h: self._scaled(self.attention(h, context.rotary, context.seen), self.attention_scale, keys)  # noqa: E731
        inner = partial(self.ffn, counted=context.counted) if isinstance(self.ffn, MixtureOfExperts) else self.ffn
        ffn = lambda h: self._scaled(inner(h), self.ffn_scale, other_keys)  # noqa: E731
        if self.ffn_norm is None:
            h = self.attention_norm(x)
            return self._add(x, attention(h) + ffn(h), context)
        x = self._join(x, self.attention_norm, attention, context)
        return self._join(x, self.ffn_norm, ffn, context)

    def _join(self, x: Tensor, norm: Norm, sublayer: Callable[[Tensor], Tensor], context: Context) -> Tensor:
        if self.row.norm == "before":
            return self._add(x, sublayer(norm(x)), context)
        if self.row.norm == "within":
            return self._add(x, norm(sublayer(x)), context)
        return norm(self._add(x, sublayer(x), context))

    def _scaled(self, y: Tensor, scale: Tensor | None, keys: Tensor | None) -> Tensor:
        y = dropout(y, self.dropout, keys)
        return y if scale is None else y * scale.to(y.dtype)

    def _add(self, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """skip·x + branch·y, in the coefficients' precision where there are any, rounded once."""
        for factor in (self.branch, context.branch):
            if factor is not None:
                y = y * factor
        return (x + y if self.skip is None else torch.addcmul(y, x, self.skip)).to(x.dtype)

    def _channel_scale(self, d: int, dtype: torch.dtype) -> nn.Parameter | None:
        start = self.row.channel_scale
        return None if start is None else declare(ParamSpec((d,), "scale", "tokens", mean=start), dtype)
