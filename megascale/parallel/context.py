"""Context parallelism: every rank holds some positions of each sequence, and attention is where they meet.

Ulysses (arXiv 2309.14509) trades tokens for heads in one all-to-all, attends as one process would, and trades back. A ring (arXiv
2310.01889) leaves queries where they are and passes keys and values from rank to rank; it has no limit in the number of heads. Both
together: neighbours trade heads, groups of them form the ring. Exchanges enter the model as callables; everything else in it works token by
token on the positions at hand.

Shapes: b micro-batch, h query heads, g KV heads, s positions here, e head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megascale.comm.collectives import Passing, copy_to_ranks, gather_unequal, pass_on, switch
from megascale.comm.graphs import outside_graphs
from megascale.comm.mesh import Axis, Mesh
from megascale.config.schema import Parallel
from megascale.model.attention import Attend, attend, kv_heads_of
from megascale.model.family import Family
from megascale.model.ops.attention_tiles import AttentionMask, Ranges, add_block, add_block_gradients

HEADS, SEQUENCE = 1, 2  # dimensions of [b, h, s, e]


def cut_evenly(length: int, parts: int) -> list[int]:
    """Lengths that differ by one at most."""
    return [length * (i + 1) // parts - length * i // parts for i in range(parts)]


def places(length: int, ring: int, ulysses: int = 1, grain: int = 1) -> list[list[range]]:
    """The positions that each cp rank holds, in multiples of `grain`; neighbours of one ring place come one after the other.

    With causal attention a late query sees more than an early one. So the sequence is cut into 2·ring pieces and ring place i holds pieces
    i and 2·ring−1−i: the same work for all (zig-zag).
    """
    pieces = cut_evenly(length // grain, 2 * ring)
    ends = [0, *accumulate(n * grain for n in pieces)]
    held = []
    for i in range(ring):
        pair = [range(ends[j], ends[j + 1]) for j in (i, 2 * ring - 1 - i)]
        mine = _joined(pair)
        begin = 0
        for n in cut_evenly(sum(map(len, mine)) // grain, ulysses):
            held.append(_between(mine, begin, begin + n * grain))
            begin += n * grain
    return held


def _joined(ranges: Ranges) -> list[range]:
    """Touching ranges made one, empty ones left out."""
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
    """Who holds what: `held` positions of every cp rank, `met` those of every ring place, which one rank has in attention."""

    held: list[list[range]]
    met: list[list[range]]

    @staticmethod
    def of(length: int, ring: int, ulysses: int, grain: int) -> Spread:
        held = places(length, ring, ulysses, grain)
        met = [_joined([r for part in held[i * ulysses : (i + 1) * ulysses] for r in part]) for i in range(ring)]
        return Spread(held, met)


def spread_sequence(model: Family, mesh: Mesh, cfg: Parallel) -> None:
    """Cuts tokens over cp where they enter the model and hangs the exchange into its attentions. After the tensor pass, whose heads it cuts
    further. Identity at size one.

    An encoder–decoder's sources and targets are cut each by their own length; attention of targets to sources has cut queries and meets all
    keys, gathered once for all layers.
    """
    cp, ring, ulysses = mesh["cp"], mesh["cp_ring"], mesh["cp_ulysses"]
    if cp.size == 1:
        return
    length, source_len = model.shape.seq_len, model.shape.source_len or model.shape.seq_len
    grain = cfg.tp if cfg.tp_sequence else 1
    spreads = {n: Spread.of(n, ring.size, ulysses.size, grain) for n in (length, source_len)}
    exchanges = model.exchanges
    exchanges.sequence_here = lambda x: take(x, spreads[x.shape[1]].held[cp.rank])
    exchanges.enter_memory = partial(whole, enter=exchanges.enter_memory, held=spreads[source_len].held, axis=cp)
    first, last = exchanges.heads
    ends = list(accumulate(cut_evenly(last - first, ulysses.size), initial=first))
    exchanges.heads = (ends[ulysses.rank], ends[ulysses.rank + 1])
    for name, block in model.units():
        block.attention.attend = meeting(block.attention.attend, spreads[model.length_of(name)], ring, ulysses)


def meeting(alone: Attend, spread: Spread, ring: Axis, ulysses: Axis) -> Attend:
    """How tokens meet that would meet by `alone`, attend or attend_all, on one rank."""
    meet = alone if ring.size == 1 else partial(ring_attention, axis=ring, met=spread.met, causal=alone is attend)
    if ulysses.size == 1:
        return meet
    first = ring.rank * ulysses.size
    lengths = [total(r) for r in spread.held[first : first + ulysses.size]]
    return partial(ulysses_attention, axis=ulysses, lengths=lengths, inner=meet)


def whole(x: Tensor, enter: Callable[[Tensor], Tensor], held: list[list[range]], axis: Axis) -> Tensor:
    """A memory's tokens [b, t_here, d], through the tensor ranks' `enter`, from all cp ranks and in the order of their positions [b, t, d];
    backward each rank gets the sum of all ranks' gradients of its own.
    """
    x = copy_to_ranks(gather_unequal(enter(x), axis, 1, [total(r) for r in held]), axis)
    ranges = [r for part in held for r in part]
    lies = accumulate((len(r) for r in ranges), initial=0)
    pieces = sorted((r.start, begin, len(r)) for r, begin in zip(ranges, lies))
    return torch.cat([x[:, begin : begin + n] for _, begin, n in pieces], 1)


def take(x: Tensor, ranges: Ranges) -> Tensor:
    """The columns `ranges` of x [b or 1, S]."""
    return torch.cat([x[:, r.start : r.stop] for r in ranges], dim=1)


@outside_graphs
def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, axis: Axis, lengths: list[int], inner: Attend) -> Tensor:
    """q [b, h, s, e], k and v [b, g, s, e] → [b, h, s, e]: tokens for heads, attention of this rank's heads, heads for tokens.

    lengths  positions that each rank of the axis holds

    A KV head goes to every rank whose query heads use it, so there may be fewer of them than ranks.
    """
    heads = cut_evenly(q.shape[HEADS], axis.size)
    group = q.shape[HEADS] // k.shape[HEADS]
    queries = [range(end - n, end) for n, end in zip(heads, accumulate(heads))]
    served = [kv_heads_of(r, group) for r in queries]
    # One message for all three: for each rank its query heads, then the KV heads they use. A head sent twice gets its gradients summed by
    # the slices' own backward.
    packed = torch.cat([x[:, r.start : r.stop] for mine, (kv, _) in zip(queries, served) for x, r in ((q, mine), (k, kv), (v, kv))], HEADS)
    parts = [len(mine) + 2 * len(kv) for mine, (kv, _) in zip(queries, served)]
    kv, expand = served[axis.rank]
    whole = switch(packed, axis, HEADS, parts, SEQUENCE, lengths).split([heads[axis.rank], len(kv), len(kv)], HEADS)
    k, v = (x if expand is None else x[:, expand] for x in whole[1:])
    return switch(inner(whole[0], k, v, mask), axis, SEQUENCE, lengths, HEADS, heads)


@outside_graphs
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, axis: Axis, met: list[list[range]], causal: bool = True
) -> Tensor:
    """q [b, h, s, e], k and v [b, g, s, e] of this ring place's positions → [b, h, s, e].

    met     the positions of every place of the ring
    causal  where `mask` is None: a token sees itself and what is before it, else everything
    """
    return _Ring.apply(q, k, v, mask or AttentionMask(causal), axis, met)  # type: ignore[no-any-return]


class _Ring(torch.autograd.Function):
    """Keys and values go once around; in the backward pass again, and their gradients follow one step behind.

    While a block is attended to, the next is already on its way. A rank's own block contributes to its gradients at home, so that those on
    the road make one step fewer.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, axis: Axis, met: list[list[range]]) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full((*q.shape[:3], 1), float("-inf"), dtype=wide, device=q.device)
        for block, owner, _ in _around(torch.stack((k, v)), axis, met):
            add_block(out, lse, q, block[0], block[1], met[axis.rank], met[owner], mask)
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.arguments = mask, axis, met
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        mask, axis, met = ctx.arguments
        d_out = grads[0]
        delta = (d_out.to(lse.dtype) * out).sum(-1, keepdim=True)
        d_q = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        home = torch.zeros((2, *k.shape), dtype=lse.dtype, device=q.device)
        on_the_road: Passing | None = None
        for block, owner, step in _around(torch.stack((k, v)), axis, met):
            part = torch.zeros(block.shape, dtype=lse.dtype, device=q.device) if step else home
            add_block_gradients((d_q, part[0], part[1]), d_out, delta, lse, q, block[0], block[1], met[axis.rank], met[owner], mask)
            if step:
                if on_the_road is not None:
                    part += on_the_road.wait()
                shape = list(block.shape)
                shape[3] = total(met[(owner - 1) % axis.size])
                on_the_road = pass_on(part, shape, axis)
        if on_the_road is not None:
            home += on_the_road.wait()
        return d_q.to(q.dtype), home[0].to(k.dtype), home[1].to(v.dtype), None, None, None


def _around(block: Tensor, axis: Axis, met: list[list[range]]) -> Iterator[tuple[Tensor, int, int]]:
    """Yields (keys and values [2, b, g, t, e], the ring place they belong to, step), one's own first, while the next is on its way."""
    for step in range(axis.size):
        owner = (axis.rank - step) % axis.size
        coming = None
        if step < axis.size - 1:
            shape = list(block.shape)
            shape[3] = total(met[(owner - 1) % axis.size])
            coming = pass_on(block, shape, axis)
        yield block, owner, step
        if coming is not None:
            block = coming.wait()
