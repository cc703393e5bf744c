"""Learned biases by distance (T5, arXiv 1910.10683, section 2.1): every head adds a bias from its table to each score, by distance.

Distances share buckets: small ones have one each, large ones a logarithmic range, and all beyond the last distance the last bucket. A stack
has one table for all its layers. It is stored on the first stage and sent to the others appended to the stream's tokens, and its gradient
returns with theirs, so that no weight is stored twice.

Shapes: n buckets, h heads here, b micro-batch, s queries, t keys, d hidden, r rows of a stream that hold a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megascale.config.schema import Model
from megascale.model.ops.attention_tiles import AttentionMask


def buckets(back: Tensor, number: int, furthest: int, causal: bool) -> Tensor:
    """Bucket of each distance (query − key), any shape. If not causal, later keys have the second half of the buckets.

    The logarithm is rounded in fp32, as in T5's code: in fp64 some borders would differ.
    """
    later = torch.zeros_like(back)
    if causal:
        far = back.clamp(min=0)
    else:
        number //= 2
        later, far = (back < 0) * number, back.abs()
    exact = number // 2
    share = torch.log(far.clamp(min=1).float() / exact) / math.log(furthest / exact)
    ranged = (exact + (share * (number - exact)).long()).clamp(max=number - 1)
    return later + torch.where(far < exact, far, ranged)


def bias_by_distance(table: Tensor, back: Tensor, furthest: int, causal: bool) -> Tensor:
    """table [n, h] for distances [..., s, t] → [..., h, s, t]"""
    return table[buckets(back, table.shape[0], furthest, causal)].movedim(-1, -3)


def biased(
    cfg: Model, table: Tensor, length: int, causal: bool, documents: Tensor | None = None, valid: Tensor | None = None
) -> AttentionMask:
    """The mask of `length` tokens on themselves, with biases from table [n, h]: their own document, `valid` [b, s] keys, and if `causal`
    only earlier ones. One tensor [1 or b, h, s, s] for all layers of a stack.
    """
    place = torch.arange(length, device=table.device)
    back = place[:, None] - place
    hidden = (back < 0)[None] if causal else torch.zeros_like(back, dtype=torch.bool)[None]
    if causal and cfg.sliding_window is not None:
        hidden = hidden | (back >= cfg.sliding_window)
    if documents is not None:
        hidden = hidden | (documents[:, :, None] != documents[:, None, :])
    if valid is not None:
        hidden = hidden | ~valid[:, None, :]
    bias = bias_by_distance(table, back, cfg.relative_distance, causal)
    return AttentionMask(causal, bias=bias.masked_fill(hidden[:, None], float("-inf")))


def rows_for(cfg: Model, heads: int) -> int:
    """Rows [d] that a table with `heads` takes in a stream."""
    return -(-cfg.relative_buckets * heads // cfg.hidden_size)


def attach(stream: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Appends the tables to the tokens of the stream [b, s, d], the same for every sample."""
    b, _, d = stream.shape
    rows = [torch.nn.functional.pad(t.flatten(), (0, -t.numel() % d)).view(-1, d) for t in tables]
    return torch.cat((stream, torch.cat(rows).expand(b, -1, -1)), 1) if rows else stream


def detach(cfg: Model, stream: Tensor, count: int, heads: int) -> tuple[Tensor, list[Tensor]]:
    """Splits the stream from its tables, `count` of [n, h], taken from the first sample."""
    rows = rows_for(cfg, heads)
    tokens, *held = stream.split([stream.shape[1] - count * rows, *[rows] * count], 1)
    return tokens, [h[0].flatten()[: cfg.relative_buckets * heads].view(-1, heads) for h in held]
