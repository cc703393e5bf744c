"""One block: attention, cross-attention if any, then feed-forward, each joined to the stream by its row of the residual table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.model.attention import Attention
from megascale.model.experts import MixtureOfExperts
from megascale.model.family import Unit
from megascale.model.feedforward import FeedForward
from megascale.model.layers import Norm, dropout
from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.position import Rotary
from megascale.model.residual import Residual, Stack
from megascale.model.spec import ParamSpec, declare, declare_state
from megascale.plugins import resolve
from megascale.splitmix import mix64_signed


class Memory(NamedTuple):
    """What cross-attention attends to: tokens [b, t, d], and a mask of those that exist (None: all)."""

    tokens: Tensor
    mask: AttentionMask | None


def key_padding_mask(valid: Tensor) -> AttentionMask:
    """Allows all keys that are `valid` [b, t], and always the first: an empty place of the batch has no other, and would divide 0 by 0."""
    valid = valid.clone()
    valid[:, 0] = True
    return AttentionMask(causal=False, valid=valid)


class Context(NamedTuple):
    """A block's inputs besides the stream: rotary angles, the attention mask (None: a token attends to itself and all before it, or to all
    if attention is not causal), dropout keys [b, s] of the layer, the factor [1] on every branch that follows the global step (None: the
    scheme has none), the weight [b, s] of each token in auxiliary losses (None: no losses), and a memory for cross-attention.
    """

    rotary: Rotary | None
    mask: AttentionMask | None
    keys: Tensor | None
    branch: Tensor | None
    loss_weights: Tensor | None
    memory: Memory | None = None


class Block(Unit):
    """The row's coefficients are checkpoint state, one pair per layer, so that a layer keeps its own when the stack grows."""

    skip: Tensor | None
    branch: Tensor | None

    def __init__(self, cfg: Model, row: Residual, stack: Stack, dtype: torch.dtype, sparse: bool) -> None:
        super().__init__()
        self.cfg, self.row, self.dropout, d = cfg, row, cfg.dropout, cfg.hidden_size
        bias = cfg.bias and "norm" not in row.scheme.unbiased

        def norm(name: str, alpha: float) -> Norm:
            return Norm(d, cfg.norm, row.norm_eps[name], "tokens", dtype, bias, alpha)

        def post(name: str) -> Norm | None:
            return norm(name, cfg.dyt_alpha[1]) if row.scheme.norm == "around" else None

        self.attention_norm, self.attention_post_norm = norm("attention_norm", cfg.dyt_alpha[0]), post("attention_post_norm")
        kind = resolve(cfg.attention_row.build, f"the attention {cfg.attention}")
        self.attention = kind(cfg, row, dtype, stack.side == "decoder")
        self.cross_norm: Norm | None = None
        self.cross_post_norm: Norm | None = None
        self.cross: Attention | None = None
        self.cross_scale: nn.Parameter | None = None
        if "cross" in stack.sublayers:
            self.cross_norm = None if row.scheme.one_norm else norm("cross_norm", cfg.dyt_alpha[0])
            self.cross_post_norm = post("cross_post_norm")
            self.cross = Attention(cfg, row, dtype, False, row.cross)
            self.cross_scale = self._channel_scale(d, dtype)
        self.ffn_norm = None if row.scheme.one_norm else norm("ffn_norm", cfg.dyt_alpha[1])
        self.ffn_post_norm = post("ffn_post_norm")
        self.ffn = MixtureOfExperts(cfg, row, dtype) if sparse else FeedForward(cfg, row, dtype)
        self.attention_scale = self._channel_scale(d, dtype)
        self.ffn_scale = self._channel_scale(d, dtype)
        # In bf16 a λ of 0.9995 would round to 1, and a stack of a thousand layers would lose its factor.
        exact = torch.promote_types(dtype, torch.float32)
        for name, value in (("skip", row.skip), ("branch", row.branch)):
            if value == 1.0:
                self.register_buffer(name, None)
            else:
                declare_state(self, name, ParamSpec((1,), "coefficient", "tokens", mean=value), exact)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [b, s, d] → [b, s, d]"""
        return self.both(x, context) if self.row.scheme.together else self.feed(self.meet(x, context), context)

    def both(self, x: Tensor, context: Context) -> Tensor:
        """Attention and feed-forward of the same stream, behind one norm or two, added to it together."""
        h = self.attention_norm(x)
        y = self._attend(h, context) + self._feed_forward(h if self.ffn_norm is None else self.ffn_norm(x), context)
        return self._add(x, y if self.cross is None else y + self._cross_attend(h, context), context)

    def meet(self, x: Tensor, context: Context) -> Tensor:
        """The attention sublayers."""
        x = self._join(x, self.attention_norm, self.attention_post_norm, partial(self._attend, context=context), context)
        if self.cross_norm is not None:
            x = self._join(x, self.cross_norm, self.cross_post_norm, partial(self._cross_attend, context=context), context)
        return x

    def feed(self, x: Tensor, context: Context) -> Tensor:
        """The feed-forward sublayer."""
        assert self.ffn_norm is not None
        return self._join(x, self.ffn_norm, self.ffn_post_norm, partial(self._feed_forward, context=context), context)

    def _attend(self, h: Tensor, context: Context) -> Tensor:
        return self._scaled(self.attention(h, context.rotary, context.mask), self.attention_scale, context.keys)

    def _feed_forward(self, h: Tensor, context: Context) -> Tensor:
        keys = None if context.keys is None else ~context.keys
        y = self.ffn(h, context.loss_weights) if isinstance(self.ffn, MixtureOfExperts) else self.ffn(h)
        return self._scaled(y, self.ffn_scale, keys)

    @property
    def sublayers(self) -> list[Any]:
        return [self.attention, self.ffn] if self.cross is None else [self.attention, self.cross, self.ffn]

    def _cross_attend(self, h: Tensor, context: Context) -> Tensor:
        """The branch of cross-attention. It uses no positions, since those of two sequences are unrelated."""
        assert self.cross is not None and context.memory is not None
        keys = None if context.keys is None else mix64_signed(context.keys)
        return self._scaled(self.cross(h, None, context.memory.mask, context.memory.tokens), self.cross_scale, keys)

    def _join(self, x: Tensor, norm: Norm, post: Norm | None, sublayer: Callable[[Tensor], Tensor], context: Context) -> Tensor:
        if post is not None:
            return self._add(x, post(sublayer(norm(x))), context)
        if self.row.scheme.norm == "before":
            return self._add(x, sublayer(norm(x)), context)
        if self.row.scheme.norm == "within":
            return self._add(x, norm(sublayer(x)), context)
        return norm(self._add(x, sublayer(x), context))

    def _scaled(self, y: Tensor, scale: Tensor | None, keys: Tensor | None) -> Tensor:
        y = dropout(y, self.dropout, keys)
        return y if scale is None else y * scale.to(y.dtype)

    def _add(self, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """skip·x + branch·y, in the coefficients' precision if there are any, rounded once."""
        for factor in (self.branch, context.branch):
            if factor is not None:
                y = y * factor
        return (x + y if self.skip is None else torch.addcmul(y, x, self.skip)).to(x.dtype)

    def _channel_scale(self, d: int, dtype: torch.dtype) -> nn.Parameter | None:
        start = self.row.channel_scale
        return None if start is None else declare(ParamSpec((d,), "scale", "tokens", mean=start), dtype)
