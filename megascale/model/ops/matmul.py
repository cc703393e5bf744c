"""Products of bf16 values, also on CPUs without instructions for them: x86 before AVX512-BF16, and others without support by oneDNN.

There bf16 products take 2.5 times as long as fp32's (AVX-512) or up to 400 times (AVX2). So both factors are widened to fp32, which is
exact, multiplied, and the result is rounded to bf16: sums in fp32 and one rounding, as with the instructions, forward and backward. Tensors
saved for backward stay in bf16. On every other device and in every other dtype these are torch's own functions.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Values of ONEDNN_MAX_CPU_ISA for which oneDNN still accepts bf16, without instructions for it.
EMULATED = ("AVX512_CORE", "AVX512_CORE_VNNI")


def has_bf16_products(limit: str) -> bool:
    """Whether torch uses oneDNN for bf16 products here, with instructions for them. Nothing is measured. `limit`: the value of
    ONEDNN_MAX_CPU_ISA, which torch's own check of the processor ignores.
    """
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    taken = torch.backends.mkldnn.is_available() and ask is not None and bool(ask())
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return taken
    return taken and limit.upper() not in EMULATED and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


# Evaluated once at import, since compiled code cannot do it.
NATIVE = has_bf16_products(os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", ""))
# Rows up to which torch's bf16 product is as fast as fp32's because it is memory-bound: a step of generation.
FEW = 4


def widens(*factors: Tensor) -> bool:
    """Whether products of these are computed in fp32."""
    return not NATIVE and all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in factors)


def way_of(dtype: torch.dtype) -> str:
    """How products of this dtype are computed on this CPU, for the log."""
    return "fp32" if widens(torch.empty((), dtype=dtype)) else "native"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ + bias → [..., out], of one dtype."""
    return _Linear.apply(x, weight, bias) if widens(x, weight) else F.linear(x, weight, bias)  # type: ignore[no-any-return]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., m, k] · b [k, n], or b [..., k, n] of the same leading dimensions."""
    return _Matmul.apply(a, b) if widens(a, b) else a @ b  # type: ignore[no-any-return]


def product(a: Tensor, b: Tensor) -> Tensor:
    """`matmul` without gradients: inside kernels that have their own backward pass."""
    return (a.float() @ b.float()).to(a.dtype) if widens(a, b) else a @ b


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Σₖ weights [..., k] · values [..., k, d] → [..., d]"""
    if widens(weights, values):
        return matmul(weights.unsqueeze(-2), values).squeeze(-2)
    return torch.einsum("...k,...kd->...d", weights, values)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, grouped: bool = False) -> Tensor:
    """torch's attention of q [b, h, s, e] over k and v [b, g, t, e]. Fused kernels take KV heads for groups of query heads in 16 bits and
    without a mask only; KV heads are repeated otherwise, since torch would build the matrix of scores.
    """
    if grouped and (mask is not None or q.dtype == torch.float32):
        times, grouped = q.shape[1] // k.shape[1], False
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    if not widens(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    if mask is not None and mask.dtype == torch.bfloat16:
        mask = mask.float()
    y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return y.to(q.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        if x.numel() <= FEW * x.shape[-1] and weight.is_contiguous():
            return F.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        g = grads[0].float()
        rows = g.flatten(0, -2)
        into_x = (g @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        into_weight = (rows.t() @ x.flatten(0, -2).float()).to(x.dtype) if ctx.needs_input_grad[1] else None
        return into_x, into_weight, rows.sum(0).to(x.dtype) if ctx.bias and ctx.needs_input_grad[2] else None


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return product(a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b = ctx.saved_tensors
        g = grads[0].float()
        into_a = (g @ b.float().mT).to(a.dtype) if ctx.needs_input_grad[0] else None
        into_b = None
        if ctx.needs_input_grad[1]:
            left, right = (a, g) if b.ndim == a.ndim else (a.flatten(0, -2), g.flatten(0, -2))
            into_b = (left.float().mT @ right).to(b.dtype)
        return into_a, into_b
