"""What one GPU reaches kernel by kernel: copies, products in bf16 and FP8, casts, attention, experts, sums of a head's gradient.

`python -m benchmarks.gpu.ceilings` takes half a minute. Rates are medians of do_bench's runs, errors |Δ|/|exact| against fp64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import machine, write
from megascale.model.ops.compiled import compile_static
from megascale.precision.fp8 import E4M3, E5M2, to_fp8

PRODUCTS = ((8192, 4096, 4096), (8192, 4096, 16384), (8192, 16384, 4096), (16384, 2048, 2048), (16384, 2048, 8192), (4096, 8192, 4096))
ATTENTIONS = ((4, 16, 16, 4096, 128), (4, 32, 8, 4096, 64), (4, 32, 32, 4096, 64), (4, 32, 8, 4096, 128))
EXPERTS, ROWS, HIDDEN, WIDTH = 64, 32768, 2048, 1024
HEAD_ROWS, VOCAB = 2048, 128256


def milliseconds(work: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(work, warmup=10, rep=60, return_mode="median"))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def products(n: int, k: int, m: int) -> dict[str, float]:
    """TFLOP/s of [n, k] · [m, k]ᵀ, and what Hopper's fast accumulation costs in digits."""
    a, b, flops = randn(n, k), randn(m, k), 2 * n * k * m / 1e9
    a8, b8, g8, scale, one = to_fp8(a, E4M3), to_fp8(b, E4M3), to_fp8(a, E5M2), torch.tensor(0.1).cuda(), torch.ones(()).cuda()

    def product(left: Tensor, fast: bool, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch._scaled_mm(left, b8.t(), scale_a=scale, scale_b=one, out_dtype=dtype, use_fast_accum=fast)

    found = {"bf16": flops / milliseconds(lambda: a @ b.t())}
    exact = (a8.double() @ b8.double().t()) * 0.1
    for fast in (False, True):
        sums = "fast sums" if fast else "fp32 sums"
        for name, left in (("e4m3", a8), ("e5m2", g8)):
            found[f"{name}, {sums}"] = flops / milliseconds(lambda left=left, fast=fast: product(left, fast))  # type: ignore[misc]
        found[f"error, {sums}"] = ((product(a8, fast, torch.float32).double() - exact).norm() / exact.norm()).item()
    return found


def casts() -> dict[str, tuple[float, float]]:
    """TB/s of a weight's and a gradient's casts, as single operations and compiled, counting each byte once."""
    weight, gradient = torch.randn(4096, 16384, device="cuda"), randn(8192, 4096)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        y = to_fp8(x, E5M2)
        return y, y.t().contiguous()

    ways: dict[str, tuple[Callable[[Tensor], Any], Tensor, int]] = {
        "weight": (lambda x: to_fp8(x.bfloat16(), E4M3), weight, 5),
        "weight, transposed": (lambda x: to_fp8(x.bfloat16(), E4M3).t().contiguous(), weight, 5),
        "gradient, both ways": (both, gradient, 4),
        "transposition in FP8": (lambda x: x.t().contiguous(), to_fp8(weight, E4M3), 2),
    }
    found = {}
    for name, (way, x, bytes_each) in ways.items():
        compiled = compile_static(way)
        compiled(x)
        times = [milliseconds(lambda f=f, x=x: f(x)) for f in (way, compiled)]  # type: ignore[misc]
        found[name] = (bytes_each * x.numel() / times[0] / 1e9, bytes_each * x.numel() / times[1] / 1e9)
    return found


def attention(b: int, h: int, g: int, s: int, e: int) -> dict[str, float]:
    """TFLOP/s of causal attention forward and backward, not counting the masked half: as torch chooses, and per backend."""
    q, k, v = (randn(b, heads, s, e).requires_grad_() for heads in (h, g, g))
    gradient, flops = torch.randn_like(q), 3.5 * 2 * b * h * s * s * e / 1e9

    def step() -> None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=h != g)
        torch.autograd.grad(y, (q, k, v), gradient)

    found = {"as chosen": flops / milliseconds(step)}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            found[backend.name] = flops / milliseconds(step)
    return found


def experts() -> dict[str, float]:
    """TFLOP/s of one grouped product over all experts."""
    x, w, g = randn(ROWS, HIDDEN), randn(EXPERTS, WIDTH, HIDDEN), randn(ROWS, WIDTH)
    ends = torch.arange(1, EXPERTS + 1, device="cuda", dtype=torch.int32) * (ROWS // EXPERTS)
    x8, w8, scales = to_fp8(x, E4M3), to_fp8(w, E4M3), (torch.ones(ROWS).cuda(), torch.ones(EXPERTS, WIDTH).cuda())
    ways: dict[str, Callable[[], object]] = {
        "bf16": lambda: torch._grouped_mm(x, w.mT, offs=ends),
        "weight gradient, bf16": lambda: torch._grouped_mm(g.t(), x, offs=ends),
        "e4m3": lambda: torch._scaled_grouped_mm(x8, w8.mT, *scales, offs=ends, out_dtype=torch.bfloat16),
    }
    return {name: 2 * ROWS * HIDDEN * WIDTH / milliseconds(way) / 1e9 for name, way in ways.items()}


def head_gradient() -> dict[str, float]:
    """Milliseconds to add a chunk's part of the head's gradient to the sum in fp32."""
    d_logits, x, total = randn(HEAD_ROWS, VOCAB), randn(HEAD_ROWS, HIDDEN), torch.zeros(VOCAB, HIDDEN, device="cuda")
    return {
        "product, then sum": milliseconds(lambda: total.add_(d_logits.t() @ x)),
        "in the product": milliseconds(lambda: torch.addmm(total, d_logits.t(), x, out_dtype=torch.float32, out=total)),
    }


def main() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        sys.exit("this benchmark needs a GPU with FP8 and grouped products (compute capability 9.0 or newer), and there is none")
    torch.manual_seed(0)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)
    result = {
        "machine": machine(),
        "copy_terabytes_per_second": 2 * source.numel() / milliseconds(lambda: copy.copy_(source)) / 1e9,
        "products_teraflops": {str(p): products(*p) for p in PRODUCTS},
        "casts_terabytes_per_second_plain_and_compiled": casts(),
        "attention_teraflops": {str(a): attention(*a) for a in ATTENTIONS},
        "experts_teraflops": experts(),
        "head_gradient_milliseconds": head_gradient(),
    }
    write(__file__, "ceilings", result)


if __name__ == "__main__":
    main()
