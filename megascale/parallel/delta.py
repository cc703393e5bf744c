"""The gated delta rule over the ranks of cp: in a ring by passing states, under Ulysses by heads.

A piece of a sequence turns the state before it into the one after it by an affine map, S → M·S + B. Each rank computes the maps of its
pieces, all ranks get all maps in one exchange, and each applies those of the pieces before its own; backward passes the state's gradient
the other way. So every piece is scanned at the same time, in whatever order the ring deals pieces. The convolution gets the few tokens
before each piece in another exchange.

Shapes: b micro-batch, s positions here, n key heads, h value heads, K and V channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.comm.collectives import all_gather, copy_to_ranks, gather_unequal, switch
from megascale.comm.mesh import Axis
from megascale.model.attention_delta import HeadWeights, Recall, Streams, recall
from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.ops.delta_rule import Fold, Piece, chain, scan, scan_back
from megascale.parallel.ring import RINGS, Ring

SEQUENCE, HEADS = 1, 2  # dimensions of [b, s, heads, …]


def in_ring(ring: Ring, take: Callable[[Tensor], Tensor]) -> Recall:
    """`recall` for the ring's pieces. `take`: this rank's entries of a [b, S] tensor."""
    return partial(recall, ahead=partial(after_others, ring=ring), scan=partial(ring_rule, ring=ring), here=take)


def after_others(x: Tensor, tokens: int, ring: Ring) -> list[Tensor]:
    """Each piece of x [b, s, c] with the `tokens` before it, from the ranks that hold them; zeros before the first."""
    pieces = x.split([len(r) for r in ring.here], 1)
    if tokens == 0:
        return list(pieces)
    kept = [[min(tokens, len(r)) for r in held] for held in ring.held]
    ends = torch.cat([piece[:, -n:] for piece, n in zip(pieces, kept[ring.axis.rank])], 1)
    lengths = [sum(lengths) for lengths in kept]
    every = copy_to_ranks(gather_unequal(ends, ring.axis, 1, lengths), ring.axis)
    ranges = [r for held in ring.held for r in held]
    parts = every.split([n for lengths in kept for n in lengths], 1)
    by_place = sorted(zip((r.start for r in ranges), range(len(ranges))))
    found = []
    for piece, own in zip(pieces, ring.here):
        before = [parts[i] for start, i in by_place if start < own.start]
        last = torch.cat([F.pad(piece[:, :0], (0, 0, tokens, 0)), *before[-tokens:]], 1)[:, -tokens:]
        found.append(torch.cat((last, piece), 1))
    return found


def entering(pieces: list[Piece], back: bool, ring: Ring) -> list[Tensor | None]:
    """The state before each of this rank's pieces, from the maps of all ranks' pieces; `back`: its gradient after each."""
    maps = [map_of(step, gain, back) for step, gain in pieces]
    most = max(map(len, ring.held))
    maps += [torch.zeros_like(maps[0])] * (most - len(maps))
    every = all_gather(torch.stack(maps), ring.axis, 0)
    values = pieces[0][1].shape[-1]
    state = torch.zeros_like(maps[0][..., :values])
    found: dict[tuple[int, int], Tensor] = {}
    for _, place, number in sorted(((r.start, p, i) for p, held in enumerate(ring.held) for i, r in enumerate(held)), reverse=back):
        found[place, number] = state
        gain, step = every[place * most + number].split((values, every.shape[-1] - values), -1)
        state = gain + step @ state
    return [found[ring.axis.rank, i] for i in range(len(pieces))]


def map_of(step: Tensor, gain: Tensor, back: bool) -> Tensor:
    """B beside M [b, n, r, K, V + K] of a piece: what it makes of no state, and of each direction of one."""
    k = step.shape[-1]
    first = torch.cat(
        (torch.zeros_like(gain[:, :, :, 0]), torch.eye(k, dtype=gain.dtype, device=gain.device).expand_as(step[:, :, :, 0])), -1
    )
    return chain(step, F.pad(gain, (0, k)), first, back)[1]


def ring_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, age: Tensor | None, ring: Ring) -> Tensor:
    """`delta_rule` of this rank's pieces of the sequence."""
    return _rule(q, k, v, g, beta, age, ring.name)[0]  # type: ignore[no-any-return]


@torch.library.custom_op(
    "megascale::ring_delta_rule",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? age, str ring) -> (Tensor, Tensor)",
)
def _rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, age: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    ring = RINGS[name]
    out, first, _ = scan((q, k, v, g, beta), age, _fold(ring), partial(entering, ring=ring))
    return out, torch.stack([state for state in first if state is not None])


@torch.library.custom_op(
    "megascale::ring_delta_rule_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? age, Tensor first, str ring) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _rule_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, age: Tensor | None, first: Tensor, name: str
) -> tuple[Tensor, ...]:
    ring = RINGS[name]
    return scan_back((q, k, v, g, beta), age, _fold(ring), d_out, list(first), partial(entering, ring=ring))


def _fold(ring: Ring) -> Fold:
    return Fold.of([len(r) for r in ring.here])


@_rule.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, age: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    b, n, h = q.shape[0], q.shape[2], v.shape[2]
    first = g.new_empty((len(RINGS[name].here), b, n, h // n, q.shape[3], v.shape[3]))
    return torch.empty_like(v, memory_format=torch.contiguous_format), first


@_rule_backward.register_fake
def _(d_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:5])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.ring = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Any, ...]:
    return (*_rule_backward(d_out, *ctx.saved_tensors, ctx.ring), None, None)


_rule.register_autograd(_backward, setup_context=_keep)
OPERATOR = torch.ops.megascale.ring_delta_rule.default


def by_heads(x: Streams, own: HeadWeights, mask: AttentionMask | None, axis: Axis, lengths: list[int], inner: Recall) -> Tensor:
    """Trades tokens for heads, recalls with this rank's heads, trades back. A key head goes with its value heads.

    lengths  positions held by each rank of the axis
    """
    n, r = x.q.shape[2], x.v.shape[2] // x.q.shape[2]
    heads = [n * (i + 1) // axis.size - n * i // axis.size for i in range(axis.size)]
    end = list(accumulate(heads))[axis.rank]
    mine = range(end - heads[axis.rank], end)
    packed = torch.cat([y.reshape(*y.shape[:2], n, -1) for y in x], 3)
    whole = switch(packed, axis, HEADS, heads, SEQUENCE, lengths)
    split = whole.split([y[0, 0].numel() // n for y in x], 3)
    streams = Streams(*(y.reshape(*y.shape[:2], -1, *z.shape[3:]) for y, z in zip(split, x)))
    weights = HeadWeights(*(rows(w, mine, n) for w in own))
    y = inner(streams, weights, mask).reshape(*whole.shape[:3], -1)
    return switch(y, axis, SEQUENCE, lengths, HEADS, heads).reshape(*x.q.shape[:2], n * r, -1)


def rows(weight: Tensor, heads: range, of: int) -> Tensor:
    """The rows of some of its `of` key heads."""
    each = weight.shape[0] // of
    return weight[heads.start * each : heads.stop * each]
