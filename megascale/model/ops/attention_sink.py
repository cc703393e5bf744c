"""Plain attention with sinks by torch's fused kernels: their result and log Σ exp are merged with the sinks, and with the merged ones their
backward pass computes the gradients of the whole softmax (attention_fused.py).

It is a custom operator, so that torch.compile and selective recomputation treat it as a unit. Shapes: b micro-batch, h heads, g KV heads
dividing h, s queries, t keys, e head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megascale.model.ops.attention_fused import block_attention, block_gradients, merge
from megascale.model.ops.attention_tiles import begun, sink_gradient


def sink_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, causal: bool) -> Tensor:
    """q [b, h, s, e], k and v [b, g, t, e], sinks [h] → [b, h, s, e]: Σ exp(score)·v ÷ (exp(sink) + Σ exp(score)) per head."""
    return _attention(q, k, v, sinks, causal)[0]  # type: ignore[no-any-return]


@torch.library.custom_op("megascale::sink_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = begun(q, sinks)
    merge(out, lse, *block_attention(q, k, v, causal))
    return out.to(q.dtype), lse


@torch.library.custom_op("megascale::sink_attention_backward", mutates_args=())
def _attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    found = block_gradients(d_out, q, k, v, out, lse, causal)
    return tuple(g.to(x.dtype).contiguous() for g, x in zip(found, (q, k, v)))  # type: ignore[return-value]


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((*q.shape[:3], 1), dtype=wide)


@_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, sinks, out, lse = ctx.saved_tensors
    grads = _attention_backward(d_out, q, k, v, out, lse, ctx.causal)
    return (*grads, sink_gradient(d_out, out, lse, sinks), None)


_attention.register_autograd(_backward, setup_context=_keep)
