"""Attention over parts of a sequence, tile by tile: for rings of ranks, and for lengths whose scores do not fit into memory.

A rank has queries at some positions and receives keys of others block by block. Results of blocks are merged with their log-sums (online
softmax, arXiv 1805.02867), so the order of blocks only affects rounding. Scores exist for one tile at a time.

Shapes: b micro-batch, g KV heads, r query heads for each, h = g·r, n queries here, t keys of a block, e head size, S whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megascale.model.ops.matmul import widens

SCORES = 1 << 21  # scores per tile over all heads: 8 MiB in fp32
ROWS = 16  # least queries of a tile, so that matrix products stay efficient
TALL = 128  # most queries of a tile, so that few of its pairs are masked

Ranges = Sequence[range]  # consecutive positions each, ascending: positions of a rank's tokens in the whole sequence


class AttentionMask(NamedTuple):
    """Which keys a query attends to, by position: up to its own (`causal`), the last `window`, those of its own document (`documents` [b,
    S], a run of equal numbers each); `slopes` [h] of ALiBi weigh the distance. `blocks` is the same mask for torch's FlexAttention. `valid`
    [b, t]: existing keys, if samples have different lengths and order does not matter. `bias` [1 or b, h, s, t] contains everything, added
    to scores: learned biases, −∞ for masked pairs.

    Two more change how scores become weights: `softcap` c turns products into c·tanh(product ÷ c), before anything is added to them;
    `sinks` [h] is a logit per head that takes a share of the softmax and gives no value.
    """

    causal: bool = True
    documents: Tensor | None = None
    window: int | None = None
    slopes: Tensor | None = None
    blocks: Any = None
    valid: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def fused(self) -> bool:
        """Whether kernels for plain attention compute it: they know order, and sinks are merged into their results."""
        return all(x is None for x in (self.documents, self.window, self.slopes, self.valid, self.bias, self.softcap))


class Tile(NamedTuple):
    """Queries `rows` against `keys`, by local index; `row` and `key` are the positions of the first. `partly`: order or window mask some
    pairs.
    """

    rows: slice
    keys: slice
    row: int
    key: int
    partly: bool


def document_starts(documents: Tensor) -> Tensor:
    """[b, S] numbers → [b, S] int64: the first position of each token's run of equal numbers."""
    changed = torch.zeros_like(documents, dtype=torch.int64)
    place = torch.arange(documents.shape[1], device=documents.device)
    changed[:, 1:] = torch.where(documents[:, 1:] != documents[:, :-1], place[1:], 0)
    return changed.cummax(1).values


def tiles(
    queries: Ranges, keys: Ranges, height: int, causal: bool, window: int | None, starts: Sequence[int] | None = None
) -> Iterator[Tile]:
    """Covers every visible pair once, without empty tiles. `starts`: the first position of each position's document."""
    above = 0
    for part in queries:
        for row in range(part.start, part.stop, height):
            last = min(row + height, part.stop) - 1
            rows = slice(above + row - part.start, above + last + 1 - part.start)
            left = 0
            for block in keys:
                first = block.start if window is None else max(block.start, row - window + 1)
                first = first if starts is None else max(first, starts[row])
                stop = min(block.stop, last + 1) if causal else block.stop
                if first < stop:
                    hidden = causal and (stop - 1 > row or (window is not None and first <= last - window))
                    yield Tile(rows, slice(left + first - block.start, left + stop - block.start), row, first, hidden)
                left += len(block)
        above += len(part)


def visible_pairs(queries: Ranges, keys: Ranges, causal: bool = True, window: int | None = None) -> int:
    """The number of (query, key) pairs that a rank computes: its work, whatever the tiles."""
    pairs = 0
    for tile in tiles(queries, keys, 1, causal, window):
        pairs += tile.keys.stop - tile.keys.start
    return pairs


def begun(q: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Result [b, h, n, e] and log Σ exp [b, h, n, 1] before any block of keys, in at least fp32: 0, and −∞ or the sinks [h].

    A sink is a block of one key whose score is the sink and whose value is zero. Merged like any other, it makes result and log-sum-exp
    those of the whole softmax, and with these every kernel's backward pass computes the gradients of q, k and v.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros(q.shape, dtype=wide, device=q.device), torch.full((*q.shape[:3], 1), float("-inf"), dtype=wide, device=q.device)
    return out, lse if sinks is None else lse.copy_(sinks.view(1, -1, 1, 1))


def sink_gradient(d_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor | None:
    """[h]: a sink's weight exp(sink − lse) times the gradient of its score, which is that of any key with the value zero."""
    if sinks is None:
        return None
    delta = (d_out.to(lse.dtype) * out).sum(-1, keepdim=True)
    return -((sinks.to(lse.dtype).view(1, -1, 1, 1) - lse).exp() * delta).sum((0, 2, 3)).to(sinks.dtype)


@torch.no_grad()
def add_block(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, queries: Ranges, keys: Ranges, mask: AttentionMask) -> None:
    """Merges the attention of q [b, h, n, e] over one block k, v [b, g, t, e] into `out` [b, h, n, e] and `lse` [b, h, n, 1].

    They start as `begun`, and after all blocks hold the result and log Σ exp of the scores.
    """
    for tile in _tiles(q, k, queries, keys, mask):
        scores = _masked(_products(q, k, tile, mask)[0], q, k, tile, mask)
        top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)  # avoids −∞ − −∞ in fully masked rows
        scores.sub_(top).exp_()
        total = scores.sum(-1, keepdim=True)
        part = _ungroup(_product(scores.to(v.dtype), _keys(v, tile)), q)
        new = _ungroup(top + total.log(), q)
        old = lse[:, :, tile.rows]
        both = torch.logaddexp(old, new)
        shift = both.clamp_min(torch.finfo(both.dtype).min)
        # `part` is not divided by its sum yet, so its scale is exp(top), not exp(new).
        out[:, :, tile.rows] *= (old - shift).exp()
        out[:, :, tile.rows] += part * (_ungroup(top, q) - shift).exp()
        lse[:, :, tile.rows] = both


@torch.no_grad()
def add_block_gradients(
    grads: tuple[Tensor, Tensor, Tensor],
    d_out: Tensor,
    delta: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Ranges,
    keys: Ranges,
    mask: AttentionMask,
) -> None:
    """Adds to `grads` (of q, k, v, in at least fp32) one block's contribution. delta [b, h, n, 1] is Σ d_out·out over the channels."""
    d_q, d_k, d_v = grads
    scale = q.shape[-1] ** -0.5
    for tile in _tiles(q, k, queries, keys, mask):
        scores, share = _products(q, k, tile, mask)
        p = _masked(scores, q, k, tile, mask).sub_(_group(lse, k, tile)).exp_()
        d_rows = _group(d_out, k, tile)
        d_scores = _product(_wide(d_rows), _wide(_keys(v, tile)).transpose(1, 2)).sub_(_group(delta, k, tile)).mul_(p)
        d_scores = (d_scores if share is None else d_scores.mul_(1 - share.square())).to(q.dtype)
        d_q[:, :, tile.rows] += _ungroup(_product(d_scores, _keys(k, tile)), q) * scale
        d_k[:, :, tile.keys] += _product(d_scores.transpose(1, 2), _group(q, k, tile)).view_as(d_k[:, :, tile.keys]) * scale
        d_v[:, :, tile.keys] += _product(p.to(q.dtype).transpose(1, 2), d_rows).view_as(d_v[:, :, tile.keys])


def _tiles(q: Tensor, k: Tensor, queries: Ranges, keys: Ranges, mask: AttentionMask) -> Iterator[Tile]:
    """Tiles with about SCORES entries. Skips keys of other documents if all samples can."""
    starts, reach = None, k.shape[2]
    if mask.documents is not None and mask.causal:
        starts = document_starts(mask.documents).amin(0).tolist()
        reach = min(reach, max(here - start for here, start in enumerate(starts)) + TALL)
    if mask.window is not None:
        reach = min(reach, mask.window + TALL)
    height = max(ROWS, min(TALL, SCORES // max(1, q.shape[0] * q.shape[1] * reach)))
    return tiles(queries, keys, height, mask.causal, mask.window, starts)


def _products(q: Tensor, k: Tensor, tile: Tile, mask: AttentionMask) -> tuple[Tensor, Tensor | None]:
    """q·k/√e of one tile [b·g, r·n, t] in at least fp32; if they are capped, also their share of the cap."""
    scores = _product(_wide(_group(q, k, tile)), _wide(_keys(k, tile)).transpose(1, 2), q.shape[-1] ** -0.5)
    if mask.softcap is None:
        return scores, None
    share = scores.div_(mask.softcap).tanh_()
    return share * mask.softcap, share


def _masked(scores: Tensor, q: Tensor, k: Tensor, tile: Tile, mask: AttentionMask) -> Tensor:
    """The products of one tile with its biases, −∞ for masked pairs, in place."""
    n, t = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
    grid = scores.view(q.shape[0], k.shape[1], -1, n, t)
    back: Tensor | None = None
    if tile.partly or mask.slopes is not None:
        row = torch.arange(tile.row, tile.row + n, device=q.device)
        back = row[:, None] - torch.arange(tile.key, tile.key + t, device=q.device)
    if back is not None and mask.slopes is not None:
        grid -= mask.slopes.to(scores.dtype).view(1, k.shape[1], -1, 1, 1) * back.to(scores.dtype)
    if back is not None and tile.partly:
        grid.masked_fill_(back < 0 if mask.window is None else (back < 0) | (back >= mask.window), float("-inf"))
    if mask.documents is not None:
        of_row, of_key = mask.documents[:, tile.row : tile.row + n], mask.documents[:, tile.key : tile.key + t]
        grid.masked_fill_((of_row[:, :, None] != of_key[:, None, :])[:, None, None], float("-inf"))
    if mask.valid is not None:
        grid.masked_fill_(~mask.valid[:, None, None, None, tile.key : tile.key + t], float("-inf"))
    return scores


def _product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Batched a·b times `scale`. Not `bmm`, since selective recomputation keeps its results and scores must not be kept."""
    if widens(a, b):
        return _product(a.float(), b.float(), scale).to(a.dtype)
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def _group(x: Tensor, k: Tensor, tile: Tile) -> Tensor:
    """Rows of x [b, h, n, c] with the query heads of one KV head in one matrix: [b·g, r·n, c]."""
    rows = x[:, :, tile.rows]
    return rows.reshape(x.shape[0] * k.shape[1], -1, x.shape[3])


def _ungroup(x: Tensor, q: Tensor) -> Tensor:
    """[b·g, r·n, c] → [b, h, n, c]"""
    return x.view(q.shape[0], q.shape[1], -1, x.shape[2])


def _keys(x: Tensor, tile: Tile) -> Tensor:
    """[b, g, t, e] → the tile's [b·g, t, e]"""
    return x[:, :, tile.keys].flatten(0, 1)


def _wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
