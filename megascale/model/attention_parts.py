"""Parts that every kind of softmax attention may have: sinks beside the keys, and a gate on the result.

Shapes: b micro-batch, s sequence, d hidden, h local heads, f value channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.products import Product
from megascale.model.spec import Cut, ParamSpec, Role, declare


def sinks_of(cfg: Model, dtype: torch.dtype) -> nn.Parameter | None:
    """A learned logit per query head. It starts at zero, which is the off-by-one softmax."""
    return declare(ParamSpec((cfg.num_heads,), "bias", 0), dtype) if cfg.attention_sink == "learned" else None


def with_sinks(mask: AttentionMask | None, kind: str | None, sinks: Tensor | None, q: Tensor, causal: bool) -> AttentionMask | None:
    """`mask` with the sinks of the query heads q [b, h, s, e]: learned (GPT-OSS), zero (off-by-one softmax), or none (`kind`)."""
    if kind is None:
        return mask
    logits = q.new_zeros(q.shape[1]) if sinks is None else sinks.to(q.dtype)
    return (AttentionMask(causal) if mask is None else mask)._replace(sinks=logits)


def gate_of(cfg: Model, channels: int, product: Callable[[int, int, Role, Cut], Product]) -> Product | None:
    """The product of the layer's input that gates the heads' results, each of `channels`; None without `attention_gate`."""
    if cfg.attention_gate is None:
        return None
    return product(cfg.num_heads * (channels if cfg.attention_gate == "channel" else 1), cfg.hidden_size, "gate", 0)


def gated(y: Tensor, logits: Tensor) -> Tensor:
    """y [b, s, h·f] times the sigmoid of logits per channel [b, s, h·f] or per head [b, s, h] (Qwen3-Next; arXiv 2505.06708)."""
    share = torch.sigmoid(logits)
    if share.shape == y.shape:
        return y * share
    return (y.unflatten(2, (share.shape[2], -1)) * share.unsqueeze(-1)).flatten(2)
