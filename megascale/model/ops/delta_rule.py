"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464) over whole chunks of tokens, with a backward pass of its own.

A head keeps a state S [K, V]. Token t forgets a part of it, replaces what the key finds there, and reads:
S ← eᵍ·S, then S ← S + k·(β·(v − Sᵀk))ᵀ, then o = Sᵀq. Inside a chunk the replacements u of all tokens solve one triangular system (the WY
representation), so that only whole chunks follow each other: S ← M·S + B. Backward runs forward again; it keeps the inputs alone.

Decays run from a token to a later one, or from a document's first token: `age` counts the tokens of its document before each token, and
nothing passes from one document to the next. Everything is computed in fp32, or in fp64 if the inputs are.

Shapes: b micro-batch, s tokens, n key heads, h = n·r value heads, K and V channels, N chunks of C tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 64  # tokens, as in the paper's kernels

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q and k [b, s, n, K], v [b, s, h, V], g and β [b, s, h]


class Fold(NamedTuple):
    """How tokens are put into chunks: `lengths` of the pieces that lie here one after the other, each filled up to whole chunks of
    `chunk` tokens, a power of two.
    """

    lengths: tuple[int, ...]
    chunk: int

    @staticmethod
    def of(lengths: Sequence[int]) -> Fold:
        return Fold(tuple(lengths), min(CHUNK, 1 << (max(1, *lengths) - 1).bit_length()))

    @property
    def counts(self) -> list[int]:
        """Chunks of each piece."""
        return [-(-n // self.chunk) for n in self.lengths]

    def chunks(self, x: Tensor, last: bool = False) -> Tensor:
        """x [b, s, …] → [b, N, C, …], filled up with zeros, or with the piece's `last` entry."""
        parts = []
        for part, n, count in zip(x.split(list(self.lengths), 1), self.lengths, self.counts):
            missing = count * self.chunk - n
            if missing:
                filler = part[:, -1:].expand(-1, missing, *x.shape[2:]) if last else part.new_zeros(x.shape[0], missing, *x.shape[2:])
                part = torch.cat((part, filler), 1)
            parts.append(part)
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).unflatten(1, (-1, self.chunk))

    def tokens(self, x: Tensor) -> Tensor:
        """[b, N, C, …] → [b, s, …]"""
        found = zip(x.split(self.counts, 1), self.lengths)
        parts = [part.flatten(1, 2)[:, :n] for part, n in found]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def by_head(x: Tensor, n: int) -> Tensor:
    """[b, N, C, n·r, e] → [b, n, r, N, C, e]"""
    return x.unflatten(3, (n, -1)).permute(0, 3, 4, 1, 2, 5).contiguous()


class Chunks(NamedTuple):
    """The inputs in chunks [b, n, r, N, C, …] (q and k: r = 1), and what follows from them without any state.

    between    decay from token j to t, 0 unless t sees j
    opened     decay from the state before the chunk to a token
    closed     decay from a token to the state after the chunk
    overlap    k·k of two tokens
    whole      decay through the chunk
    inverse    of the triangular system, [C, C]
    free       u without a state before the chunk
    bound      what u loses of that state: u = free − bound·S
    step       M of the chunk, [b, n, r, N, K, K]
    gain       B of the chunk, [b, n, r, N, K, V]
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    between: Tensor
    opened: Tensor
    closed: Tensor
    whole: Tensor
    overlap: Tensor
    inverse: Tensor
    free: Tensor
    bound: Tensor
    step: Tensor
    gain: Tensor


def in_chunks(inputs: Inputs, age: Tensor | None, fold: Fold) -> Chunks:
    """age [b, s]: tokens of its document before each token; None: one document."""
    q, k, v, g, beta = inputs
    wide, n = torch.promote_types(q.dtype, torch.float32), q.shape[2]
    q, k, v = (by_head(fold.chunks(x), n).to(wide) for x in (q, k, v))
    g, beta = (by_head(fold.chunks(x).unsqueeze(-1), n).squeeze(-1).to(wide) for x in (g, beta))
    path = g.cumsum(-1)
    token = torch.arange(fold.chunk, device=q.device)
    sees = token[:, None] >= token
    opened, closed, whole = path.exp(), (path[..., -1:] - path).exp(), path[..., -1].exp()
    if age is not None:
        place = torch.cat([torch.arange(length, device=q.device) % fold.chunk for length in fold.lengths])
        begins = fold.chunks(place - age, last=True)[:, None, None]  # each token's document in its chunk; before it if negative
        sees = sees & (token >= begins.unsqueeze(-1))
        opened, closed = opened * (begins < 0), closed * (token >= begins[..., -1:])
        whole = whole * (begins[..., -1] < 0)
    between = (path.unsqueeze(-1) - path.unsqueeze(-2)).masked_fill_(~sees, float("-inf")).exp_()
    overlap = k @ k.mT
    inverse = inverted(beta.unsqueeze(-1) * between * overlap)
    right = torch.cat((beta.unsqueeze(-1) * v, (beta * opened).unsqueeze(-1) * k), -1)
    found = inverse @ right
    free, bound = found.split((v.shape[-1], k.shape[-1]), -1)
    both = (closed.unsqueeze(-1) * k).mT @ found
    gain, step = both.split((v.shape[-1], k.shape[-1]), -1)
    step = torch.diag_embed(whole.unsqueeze(-1).expand(*whole.shape, k.shape[-1])) - step
    return Chunks(q, k, v, beta, between, opened, closed, whole, overlap, inverse, free, bound, step, gain)


def inverted(below: Tensor) -> Tensor:
    """The inverse of I + what is below the diagonal of a matrix [..., C, C], C a power of two. Two inverses and the
    product between them are that of the next size: six steps for 64 rows, as exact as substitution and several times as fast.
    """
    lead, rows = below.shape[:-2], below.shape[-1]
    below = below.reshape(-1, rows, rows)
    found = below.new_ones(below.shape[0] * rows, 1, 1)
    while (size := found.shape[-1]) < rows:
        blocks = below.unflatten(1, (-1, 2, size)).unflatten(4, (-1, 2, size))[:, :, 1, :, :, 0]
        left = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, size, size)
        upper, lower = found.unflatten(0, (-1, 2)).unbind(1)
        found = below.new_zeros(left.shape[0], 2 * size, 2 * size)
        found[:, :size, :size], found[:, size:, size:] = upper, lower
        found[:, size:, :size] = -(lower @ (left @ upper))
    return found.view(*lead, rows, rows)


def chain(step: Tensor, gain: Tensor, first: Tensor | None, back: bool = False) -> tuple[Tensor, Tensor]:
    """S ← M·S + B through the chunks of a piece: step [b, n, r, N, K, K] and gain [b, n, r, N, K, V] → the states before each chunk
    [b, n, r, N, K, V], and the one after all. `back`: from the last chunk to the first, by Mᵀ.
    """
    lead, count = gain.shape[:3], gain.shape[3]
    step, gain = (step.mT if back else step).flatten(0, 2), gain.flatten(0, 2)
    states = torch.empty_like(gain, memory_format=torch.contiguous_format)
    state = torch.zeros_like(gain[:, 0]) if first is None else first.flatten(0, 2)
    for i in reversed(range(count)) if back else range(count):
        states[:, i] = state
        state = torch.baddbmm(gain[:, i], step[:, i], state)
    return states.unflatten(0, lead), state.unflatten(0, lead)


def read(c: Chunks, states: Tensor) -> Tensor:
    """The output [b, n, r, N, C, V] from the states before each chunk."""
    u = c.free - c.bound @ states
    return (c.opened.unsqueeze(-1) * c.q) @ states + ((c.q @ c.k.mT) * c.between) @ u


def adjoint_gain(c: Chunks, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """From the output's gradient: that of u, and of the state before each chunk, without what later chunks add."""
    d_u = ((c.q @ c.k.mT) * c.between).mT @ d_out
    return d_u, (c.opened.unsqueeze(-1) * c.q).mT @ d_out - c.bound.mT @ d_u


def gradients(c: Chunks, d_out: Tensor, d_u: Tensor, states: Tensor, after: Tensor) -> Inputs:
    """Gradients of the inputs in chunks. `states`: before each chunk; `after`: the gradient of the state after each; `d_u`: that of
    `adjoint_gain`.
    """
    q, k = c.q, c.k
    u = c.free - c.bound @ states
    # u = inverse·β·(v − opened·k·S), the inverse being that of I + β·between·overlap.
    d_right = c.inverse.mT @ (d_u + (c.closed.unsqueeze(-1) * k) @ after)
    d_overlap = c.between * (d_right @ u.mT).tril_(-1).neg_()
    d_beta = (d_right * (c.v - c.opened.unsqueeze(-1) * (k @ states))).sum(-1) + (d_overlap * c.overlap).sum(-1)
    d_overlap = c.beta.unsqueeze(-1) * d_overlap
    d_seen = c.between * (d_out @ u.mT)
    by_state, by_u, by_right = d_out @ states.mT, u @ after.mT, d_right @ states.mT
    d_q = c.opened.unsqueeze(-1) * by_state + d_seen @ k
    d_k = d_seen.mT @ q + (d_overlap + d_overlap.mT) @ k + c.closed.unsqueeze(-1) * by_u - (c.beta * c.opened).unsqueeze(-1) * by_right
    # A decay is e to the difference of two places on the path.
    d_between = d_overlap * c.overlap + d_seen * (q @ k.mT)
    d_closed = c.closed * (k * by_u).sum(-1)
    d_path = d_between.sum(-1) - d_between.sum(-2) - d_closed
    d_path += c.opened * ((q * by_state).sum(-1) - c.beta * (k * by_right).sum(-1))
    d_path[..., -1] += d_closed.sum(-1) + c.whole * (states * after).sum((-2, -1))
    return d_q.sum(2, keepdim=True), d_k.sum(2, keepdim=True), c.beta.unsqueeze(-1) * d_right, d_path.flip(-1).cumsum(-1).flip(-1), d_beta


Piece = tuple[Tensor, Tensor]  # step and gain of its chunks
# The state before each piece (None: zero), from all of them; with `True` the state's gradient after each.
Enter = Callable[[list[Piece], bool], list[Tensor | None]]


def alone(pieces: list[Piece], back: bool) -> list[Tensor | None]:
    """One piece, before which there is nothing."""
    return [None] * len(pieces)


def through(step: Tensor, gain: Tensor, fold: Fold, first: list[Tensor | None], back: bool = False) -> tuple[Tensor, list[Tensor]]:
    """`chain` in each piece: all states before (`back`: after) the chunks, and the last one of each piece."""
    found = [chain(*piece, state, back) for piece, state in zip(pieces_of(step, gain, fold), first)]
    return found[0][0] if len(found) == 1 else torch.cat([states for states, _ in found], 3), [last for _, last in found]


def pieces_of(step: Tensor, gain: Tensor, fold: Fold) -> list[Piece]:
    return list(zip(step.split(fold.counts, 3), gain.split(fold.counts, 3)))


def scan(inputs: Inputs, age: Tensor | None, fold: Fold, enter: Enter = alone) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """The output [b, s, h, V], and the states [b, n, r, K, V] before and after each piece."""
    c = in_chunks(inputs, age, fold)
    first = enter(pieces_of(c.step, c.gain, fold), False)
    states, last = through(c.step, c.gain, fold, first)
    return by_token(read(c, states), fold).to(inputs[2].dtype), first, last


def scan_back(
    inputs: Inputs, age: Tensor | None, fold: Fold, d_out: Tensor, first: list[Tensor | None], enter: Enter = alone
) -> tuple[Tensor, ...]:
    """Gradients of the inputs from the output's; `first` as `scan` returned it."""
    c = in_chunks(inputs, age, fold)
    states, _ = through(c.step, c.gain, fold, first)
    d_out = by_head(fold.chunks(d_out), c.q.shape[1]).to(c.q.dtype)
    d_u, gain = adjoint_gain(c, d_out)
    after, _ = through(c.step, gain, fold, enter(pieces_of(c.step, gain, fold), True), True)
    found = gradients(c, d_out, d_u, states, after)
    return tuple(by_token(g if g.ndim == 6 else g.unsqueeze(-1), fold).view_as(x).to(x.dtype) for g, x in zip(found, inputs))


def by_token(x: Tensor, fold: Fold) -> Tensor:
    """[b, n, r, N, C, e] → [b, s, n·r, e]"""
    return fold.tokens(x.permute(0, 3, 4, 1, 2, 5).flatten(3, 4)).contiguous()


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, age: Tensor | None) -> Tensor:
    """q and k [b, s, n, K], v [b, s, h, V], log decay g and β [b, s, h] → [b, s, h, V], for whole sequences."""
    return _rule(q, k, v, g, beta, age)  # type: ignore[no-any-return]


@torch.library.custom_op(
    "megascale::delta_rule",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? age) -> Tensor",
)
def _rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, age: Tensor | None) -> Tensor:
    return scan((q, k, v, g, beta), age, Fold.of([q.shape[1]]))[0]


@torch.library.custom_op(
    "megascale::delta_rule_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? age) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _rule_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, age: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return scan_back((q, k, v, g, beta), age, Fold.of([q.shape[1]]), d_out, [None])  # type: ignore[return-value]


@_rule.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@_rule_backward.register_fake
def _(d_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:5])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    return (*_rule_backward(d_out, *ctx.saved_tensors), None)


_rule.register_autograd(_backward, setup_context=_keep)
OPERATOR = torch.ops.megascale.delta_rule.default
