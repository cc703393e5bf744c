"""Attention inside documents, windows, under ALiBi or with capped scores on one rank, without a mask of [s, s]: tile by tile over visible
keys.

Only the result and each query's log Σ exp are kept; backward computes probabilities again, like FlashAttention (arXiv 2205.14135). It is a
custom operator, so that torch.compile and selective recomputation treat it as a unit.

Shapes: b micro-batch, h heads, g KV heads dividing h, s sequence, e head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megascale.model.ops.attention_tiles import AttentionMask, add_block, add_block_gradients, begun, sink_gradient


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """softmax(q·kᵀ/√e + bias)·v over visible keys: q [b, h, s, e], k and v [b, g, s, e] → [b, h, s, e]."""
    return _attention(q, k, v, mask.sinks, mask.documents, mask.slopes, mask.window, mask.softcap, mask.causal)[0]  # type: ignore[no-any-return]


@torch.library.custom_op(
    "megascale::masked_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? documents, Tensor? slopes, int? window, float? softcap, bool causal) -> "
    "(Tensor, Tensor)",
)
def _attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *masking: Any) -> tuple[Tensor, Tensor]:
    out, lse = begun(q, sinks)
    everything = [range(q.shape[2])]
    # Sample by sample: each has its own documents and therefore its own tiles.
    for i in range(q.shape[0]):
        one = slice(i, i + 1)
        mask = _mask(one, *masking)
        add_block(out[one], lse[one], q[one], k[one], v[one], everything, everything, mask)
    return out.to(q.dtype), lse


@torch.library.custom_op(
    "megascale::masked_attention_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? documents, Tensor? slopes, int? window, "
    "float? softcap, bool causal) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *masking: Any
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    everything = [range(q.shape[2])]
    delta = (d_out.to(lse.dtype) * out).sum(-1, keepdim=True)
    for i in range(q.shape[0]):
        one = slice(i, i + 1)
        mask = _mask(one, *masking)
        grads = (d_q[one], d_k[one], d_v[one])
        add_block_gradients(grads, d_out[one], delta[one], lse[one], q[one], k[one], v[one], everything, everything, mask)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)


def _mask(
    one: slice, documents: Tensor | None, slopes: Tensor | None, window: int | None, softcap: float | None, causal: bool
) -> AttentionMask:
    """The mask of one sample."""
    return AttentionMask(causal, None if documents is None else documents[one], window, slopes, softcap=softcap)


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((*q.shape[:3], 1), dtype=wide)


@_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, documents, slopes, *ctx.rest = inputs
    ctx.save_for_backward(sinks, q, k, v, *output, documents, slopes)


def _backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    sinks, *saved = ctx.saved_tensors  # recomputation allows it once
    into_sinks = sink_gradient(d_out, saved[3], saved[4], sinks)
    return (*_attention_backward(d_out, *saved, *ctx.rest), into_sinks, *[None] * 5)


_attention.register_autograd(_backward, setup_context=_keep)
