"""Attention by torch's fused kernels that also return each query's log Σ exp, so that results over several blocks of keys can be merged.

Results of two blocks merge by their log-sum-exps (online softmax, arXiv 1805.02867). A kernel's backward pass that gets the merged result
and log-sum-exp instead of its own computes the block's part of the whole gradient, since the softmax enters through these alone.

Shapes: b micro-batch, h heads, g KV heads dividing h, n queries, t keys, e head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megascale.model.ops.matmul import widens

aten = torch.ops.aten
CUDNN_FROM = 91501  # from here on torch itself prefers cuDNN's kernel on Hopper
Gradients = tuple[Tensor, Tensor, Tensor]


def takes(q: Tensor) -> bool:
    """Whether there is a fused kernel for these queries; on a GPU for 16-bit dtypes and head sizes up to 256, in multiples of 8."""
    return has_kernel(q.device, q.dtype, q.shape[-1])


def has_kernel(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """`takes` for queries of this dtype and size."""
    return device.type == "cpu" or (dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= 256)


def block_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """q [b, h, n, e] over k and v [b, g, t, e] → [b, h, n, e] and log Σ exp [b, h, n, 1]; `causal`: n = t, and a query attends to its own
    key and those before it.
    """
    k, v = _for_all_heads(k, q), _for_all_heads(v, q)
    if widens(q, k, v):
        out, lse = block_attention(q.float(), k.float(), v.float(), causal)
        return out.to(q.dtype), lse
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    elif _cudnn(q.device):
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
    else:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    return out, lse.reshape(*q.shape[:3], 1)


def block_gradients(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool) -> Gradients:
    """This block's parts of the gradients of q, k and v, from `out` [b, h, n, e] and `lse` [b, h, n, 1] merged over all blocks."""
    if widens(q, k, v):
        found = block_gradients(d_out.float(), q.float(), k.float(), v.float(), out.float(), lse, causal)
        return tuple(g.to(q.dtype) for g in found)  # type: ignore[return-value]
    heads_k, heads_v = _for_all_heads(k, q), _for_all_heads(v, q)
    lse = lse.squeeze(-1)
    if q.device.type == "cpu":
        d_q, d_k, d_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(d_out, q, heads_k, heads_v, out, lse, 0.0, causal)
    else:
        nothing = torch.zeros((), dtype=torch.int64, device=q.device)  # state of dropout, which is unused
        n, t = q.shape[2], k.shape[2]
        if _cudnn(q.device):
            d_q, d_k, d_v = aten._scaled_dot_product_cudnn_attention_backward(
                d_out, q, heads_k, heads_v, out, lse.unsqueeze(-1), nothing, nothing, None, None, None, n, t, 0.0, causal
            )
        else:
            d_q, d_k, d_v = aten._scaled_dot_product_flash_attention_backward(
                d_out, q, heads_k, heads_v, out, lse, None, None, n, t, 0.0, causal, nothing, nothing
            )
    return d_q, _over_groups(d_k, k), _over_groups(d_v, v)


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merges a block's result and log Σ exp into those so far, which start as 0 and −∞ in at least fp32."""
    both = torch.logaddexp(lse, block_lse)
    shift = both.clamp_min(torch.finfo(both.dtype).min)  # avoids −∞ − −∞ in rows that have seen nothing yet
    out.mul_((lse - shift).exp_()).addcmul_(block_out.to(out.dtype), (block_lse - shift).exp_())
    lse.copy_(both)


def _cudnn(device: torch.device) -> bool:
    """Whether cuDNN's kernel is the faster one here."""
    return (torch.backends.cudnn.version() or 0) >= CUDNN_FROM and torch.cuda.get_device_capability(device) == (9, 0)


def _for_all_heads(x: Tensor, q: Tensor) -> Tensor:
    """KV heads [b, g, t, e] repeated for the query heads that use them; not every kernel takes fewer."""
    times = q.shape[1] // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, 1)


def _over_groups(gradient: Tensor, x: Tensor) -> Tensor:
    """[b, h, t, e] → [b, g, t, e]: summed over the query heads of each KV head of x, in at least fp32."""
    if gradient.shape[1] == x.shape[1]:
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.unflatten(1, (x.shape[1], -1)).sum(2, dtype=wide)
