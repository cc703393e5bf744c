"""Context parallelism: every rank holds some positions of each sequence, and attention exchanges them.

Ulysses (arXiv 2309.14509) trades tokens for heads in one all-to-all, attends like a single process, and trades back. A ring (arXiv
2310.01889) keeps queries in place and passes keys and values from rank to rank; the number of heads does not limit it. Combined, neighbours
trade heads and groups of them form the ring. Exchanges enter the model as callables; everything else works token by token on the local
positions.

Shapes: b micro-batch, h query heads, g KV heads, s positions here, e head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megascale.comm.collectives import copy_to_ranks, gather_unequal, switch
from megascale.comm.mesh import Axis, Mesh
from megascale.config.schema import Parallel
from megascale.model.attention import Attend, attend, identity, kv_heads_of
from megascale.model.family import Family
from megascale.model.ops.attention_tiles import AttentionMask, Ranges
from megascale.parallel.delta import by_heads, in_ring
from megascale.parallel.ring import Ring, ring_attention, with_parts

HEADS, SEQUENCE = 1, 2  # dimensions of [b, h, s, e]


def cut_evenly(length: int, parts: int) -> list[int]:
    """Lengths that differ by at most one."""
    return [length * (i + 1) // parts - length * i // parts for i in range(parts)]


def places(length: int, ring: int, ulysses: int = 1, grain: int = 1, pieces: int = 2) -> list[list[range]]:
    """The positions that each cp rank holds, in multiples of `grain`; the ranks of one ring place hold consecutive parts.

    With causal attention a late query attends to more keys than an early one. So the sequence is cut into `pieces`·ring parts that are
    dealt to the places back and forth: with two, place i holds parts i and 2·ring−1−i, equal work for all (zig-zag). More pieces even out
    the work of packed documents, each of which then lies on many ranks.
    """
    ends = [0, *accumulate(n * grain for n in cut_evenly(length // grain, pieces * ring))]
    held = []
    for i in range(ring):
        dealt = [p * ring + (ring - 1 - i if p % 2 else i) for p in range(pieces)]
        mine = _joined([range(ends[j], ends[j + 1]) for j in dealt])
        begin = 0
        for n in cut_evenly(sum(map(len, mine)) // grain, ulysses):
            held.append(_between(mine, begin, begin + n * grain))
            begin += n * grain
    return held


def _joined(ranges: Ranges) -> list[range]:
    """Merges adjacent ranges and drops empty ones."""
    result: list[range] = []
    for r in ranges:
        if result and result[-1].stop == r.start:
            result[-1] = range(result[-1].start, r.stop)
        elif len(r):
            result.append(r)
    return result


def _between(ranges: Ranges, begin: int, end: int) -> list[range]:
    """Entries begin…end−1 of the ranges laid end to end."""
    result, before = [], 0
    for r in ranges:
        part = r[max(0, begin - before) : max(0, end - before)]
        if len(part):
            result.append(part)
        before += len(r)
    return result


def total(ranges: Ranges) -> int:
    return sum(map(len, ranges))


@dataclass(frozen=True)
class Spread:
    """Positions by rank: `held` by every cp rank, and `met` by every ring place, the positions that a rank has within attention."""

    held: list[list[range]]
    met: list[list[range]]

    @staticmethod
    def of(length: int, ring: int, ulysses: int, grain: int, pieces: int = 2) -> Spread:
        held = places(length, ring, ulysses, grain, pieces)
        met = [_joined([r for part in held[i * ulysses : (i + 1) * ulysses] for r in part]) for i in range(ring)]
        return Spread(held, met)


def spread_sequence(model: Family, mesh: Mesh, cfg: Parallel) -> None:
    """Splits tokens over cp where they enter the model and installs the exchange in its attentions. Runs after the tensor pass, whose heads
    it splits further. Identity at size one.

    An encoder–decoder's sources and targets are split separately by their own lengths; cross-attention has split queries and all keys,
    which are gathered once for all layers.
    """
    cp, ring, ulysses = mesh["cp"], mesh["cp_ring"], mesh["cp_ulysses"]
    if cp.size == 1:
        return
    length, source_len = model.shape.seq_len, model.shape.source_len or model.shape.seq_len
    grain = cfg.tp if cfg.tp_sequence else 1
    spreads = {n: Spread.of(n, ring.size, ulysses.size, grain, cfg.cp_pieces) for n in (length, source_len)}
    exchanges = model.exchanges
    exchanges.sequence_here = lambda x: take(x, spreads[x.shape[1]].held[cp.rank])
    exchanges.enter_memory = partial(whole, enter=exchanges.enter_memory, held=spreads[source_len].held, axis=cp)
    exchanges.sequence_whole = partial(whole, enter=identity, held=spreads[length].held, axis=cp)
    exchanges.query_heads = partial(_heads_between, before=exchanges.query_heads, axis=ulysses)
    if ring.size > 1:
        exchanges.with_blocks = partial(with_parts, axis=ring, met={n: spread.met for n, spread in spreads.items()})
    for name, block in model.units():
        alone, scans = block.attention.attend, block.cfg.attention_row.scans
        block.attention.attend = meeting(alone, spreads[model.length_of(name)], ring, ulysses, scans)


def _heads_between(heads: int, before: Callable[[int], range], axis: Axis) -> range:
    """Global numbers of the query heads that a rank has within attention, of those that it had before."""
    here = before(heads)
    ends = list(accumulate(cut_evenly(len(here), axis.size), initial=here.start))
    return range(ends[axis.rank], ends[axis.rank + 1])


def meeting(alone: Any, spread: Spread, ring: Axis, ulysses: Axis, scans: bool = False) -> Any:
    """The distributed form of `alone`, which is attend or attend_all on one rank, or recall if tokens meet through a state (`scans`)."""
    meet = alone
    if ring.size > 1:
        around = Ring.of(ring, spread.met)
        meet = in_ring(around, partial(take, ranges=around.here)) if scans else partial(ring_attention, ring=around, causal=alone is attend)
    if ulysses.size == 1:
        return meet
    first = ring.rank * ulysses.size
    lengths = [total(r) for r in spread.held[first : first + ulysses.size]]
    return partial(by_heads if scans else ulysses_attention, axis=ulysses, lengths=lengths, inner=meet)


def whole(x: Tensor, enter: Callable[[Tensor], Tensor], held: list[list[range]], axis: Axis) -> Tensor:
    """A memory's tokens [b, t_here, …], through the tensor ranks' `enter`, gathered from all cp ranks in order of position [b, t, …]. In
    backward each rank gets the sum of all ranks' gradients of its own tokens.
    """
    x = copy_to_ranks(gather_unequal(enter(x), axis, 1, [total(r) for r in held]), axis)
    ranges = [r for part in held for r in part]
    lies = accumulate((len(r) for r in ranges), initial=0)
    pieces = sorted((r.start, begin, len(r)) for r, begin in zip(ranges, lies))
    return torch.cat([x[:, begin : begin + n] for _, begin, n in pieces], 1)


def take(x: Tensor, ranges: Ranges) -> Tensor:
    """The columns `ranges` of x [b or 1, S]."""
    return torch.cat([x[:, r.start : r.stop] for r in ranges], dim=1)


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, axis: Axis, lengths: list[int], inner: Attend) -> Tensor:
    """q [b, h, s, e], k and v [b, g, s, e] → [b, h, s, e]: trades tokens for heads, attends with this rank's heads, trades back.

    lengths  positions held by each rank of the axis

    A KV head goes to every rank whose query heads use it, so there may be fewer KV heads than ranks.
    """
    heads = cut_evenly(q.shape[HEADS], axis.size)
    group = q.shape[HEADS] // k.shape[HEADS]
    queries = [range(end - n, end) for n, end in zip(heads, accumulate(heads))]
    served = [kv_heads_of(r, group) for r in queries]
    # One message for all three: for each rank its query heads, then the KV heads they use. The slices' backward sums the gradients of a
    # head that is sent twice.
    packed = torch.cat([x[:, r.start : r.stop] for mine, (kv, _) in zip(queries, served) for x, r in ((q, mine), (k, kv), (v, kv))], HEADS)
    parts = [len(mine) + 2 * len(kv) for mine, (kv, _) in zip(queries, served)]
    kv, expand = served[axis.rank]
    whole = switch(packed, axis, HEADS, parts, SEQUENCE, lengths).split([heads[axis.rank], len(kv), len(kv)], HEADS)
    k, v = (x if expand is None else x[:, expand] for x in whole[1:])
    if mask is not None and mask.sinks is not None:
        here = queries[axis.rank]
        mask = mask._replace(sinks=mask.sinks[here.start : here.stop])
    return switch(inner(whole[0], k, v, mask), axis, SEQUENCE, lengths, HEADS, heads)
