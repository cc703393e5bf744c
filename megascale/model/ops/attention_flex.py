"""The same attention as attention_masked.py on GPUs: torch's FlexAttention, which skips fully masked tiles of the square.

The tiles follow from the starts of documents, without ever building a mask of [s, s].

Shapes: b micro-batch, h heads, g KV heads dividing h, s sequence, e head size, n tiles of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megascale.model.ops.attention_tiles import AttentionMask, document_starts
from megascale.model.ops.compiled import compile_static

TILE = 128  # queries and keys of a tile


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """q [b, h, s, e], k and v [b, g, s, e] → [b, h, s, e]; `mask` must have its blocks."""
    assert mask.blocks is not None
    bias = None if mask.slopes is None else _bias(mask.slopes)
    return _kernel(q.device.type)(q, k, v, score_mod=bias, block_mask=mask.blocks, enable_gqa=q.shape[1] != k.shape[1])


def with_blocks(mask: AttentionMask, seq_len: int, device: torch.device) -> AttentionMask:
    """`mask`, which must be causal, with torch's BlockMask for it.

    A tile is full if its last query attends to its first key: then all attend to all. It is skipped if its last key is before the first key
    of its first query. In between the rule is evaluated per pair.
    """
    assert mask.causal
    starts = None if mask.documents is None else document_starts(mask.documents)
    first = torch.arange(0, seq_len, TILE, device=device)
    last = (first + TILE - 1).clamp(max=seq_len - 1)
    lowest, highest = (_furthest(starts, mask.window, queries)[:, None, :, None] for queries in (first, last))  # [1 or b, 1, n, 1]
    whole = (first >= highest) & (last < first[:, None])
    partial = (last >= lowest) & (first <= last[:, None]) & ~whole
    from torch.nn.attention.flex_attention import BlockMask  # imports the compiler

    rule = _rule(starts, mask.window)
    blocks = BlockMask.from_kv_blocks(*_ordered(partial), *_ordered(whole), BLOCK_SIZE=TILE, mask_mod=rule, seq_lengths=(seq_len, seq_len))
    return mask._replace(blocks=blocks)


def _furthest(starts: Tensor | None, window: int | None, queries: Tensor) -> Tensor:
    """[1 or b, n]: the first key that each query attends to."""
    first = torch.zeros_like(queries)[None] if starts is None else starts[:, queries]
    return first if window is None else torch.maximum(first, queries - window + 1)


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """[…, n, n] booleans → how many of each row are true, and their numbers first."""
    numbers = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1).to(torch.int32), numbers.to(torch.int32)


def _rule(starts: Tensor | None, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        result = key <= query
        if window is not None:
            result = result & (query - key < window)
        return result if starts is None else result & (key >= starts[b, query])

    return mask


def _bias(slopes: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    return lambda score, b, h, query, key: score - slopes[h] * (query - key)


@cache
def _kernel(device: str) -> Any:
    """Compiled on CUDA, where it would otherwise materialize the scores; uncompiled elsewhere, for tests."""
    from torch.nn.attention.flex_attention import flex_attention as kernel

    return compile_static(kernel) if device == "cuda" else kernel
