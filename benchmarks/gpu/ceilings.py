"""What one GPU reaches kernel by kernel: copies, products in bf16 and FP8, casts, attention, experts, sums of a head's gradient.

`python -m benchmarks.gpu.ceilings` takes half a minute. Rates are medians of do_bench's runs, errors |Δ|/|exact| against fp64. With --tiny
each part runs once, small, on any device: whether it runs at all. A part that fails costs only itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import machine, write
from megascale.model.ops.compiled import compile_static
from megascale.precision.fp8 import E4M3, E5M2, to_fp8


@dataclass(frozen=True)
class Sizes:
    """What is measured: products (n, k, m), attention (b, h, g, s, e), experts (number, rows, hidden, width), a head (rows, hidden, words),
    a weight that is cast, and bytes that are copied.
    """

    products: tuple[tuple[int, int, int], ...]
    attentions: tuple[tuple[int, int, int, int, int], ...]
    experts: tuple[int, int, int, int]
    head: tuple[int, int, int]
    cast: tuple[int, int]
    copied: int


FULL = Sizes(
    ((8192, 4096, 4096), (8192, 4096, 16384), (8192, 16384, 4096), (16384, 2048, 2048), (16384, 2048, 8192), (4096, 8192, 4096)),
    ((4, 16, 16, 4096, 128), (4, 32, 8, 4096, 64), (4, 32, 32, 4096, 64), (4, 32, 8, 4096, 128)),
    (64, 32768, 2048, 1024), (2048, 2048, 128256), (4096, 16384), 1 << 30,
)  # fmt: skip
TINY = Sizes(((32, 32, 32),), ((1, 2, 1, 32, 16),), (2, 32, 32, 16), (16, 32, 64), (32, 32), 1 << 10)


def milliseconds(work: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - begin)
    from triton.testing import do_bench

    return float(do_bench(work, warmup=10, rep=60, return_mode="median"))


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=device(), dtype=torch.bfloat16)


def products(n: int, k: int, m: int) -> dict[str, float]:
    """TFLOP/s of [n, k] · [m, k]ᵀ, and what Hopper's fast accumulation costs in digits."""
    a, b, flops = randn(n, k), randn(m, k), 2 * n * k * m / 1e9
    a8, b8, g8, scale, one = (
        to_fp8(a, E4M3),
        to_fp8(b, E4M3),
        to_fp8(a, E5M2),
        torch.tensor(0.1, device=device()),
        torch.ones((), device=device()),
    )

    def product(left: Tensor, fast: bool, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch._scaled_mm(left, b8.t(), scale_a=scale, scale_b=one, out_dtype=dtype, use_fast_accum=fast)

    found = {"bf16": flops / milliseconds(lambda: a @ b.t())}
    if device() == "cpu":
        return found
    exact = (a8.double() @ b8.double().t()) * 0.1
    for fast in (False, True):
        sums = "fast sums" if fast else "fp32 sums"
        for name, left in (("e4m3", a8), ("e5m2", g8)):
            found[f"{name}, {sums}"] = flops / milliseconds(lambda left=left, fast=fast: product(left, fast))  # type: ignore[misc]
        found[f"error, {sums}"] = ((product(a8, fast, torch.float32).double() - exact).norm() / exact.norm()).item()
    return found


def casts(shape: tuple[int, int]) -> dict[str, tuple[float, float]]:
    """TB/s of a weight's and a gradient's casts, as single operations and compiled, counting each byte once."""
    weight, gradient = torch.randn(shape, device=device()), randn(2 * shape[0], shape[0])

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
        compiled = compile_static(way) if device() == "cuda" else way
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
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if device() == "cuda" else ():
        with sdpa_kernel(backend):
            found[backend.name] = flops / milliseconds(step)
    return found


def experts(number: int, rows: int, hidden: int, width: int) -> dict[str, float]:
    """TFLOP/s of one grouped product over all experts."""
    x, w, g = randn(rows, hidden), randn(number, width, hidden), randn(rows, width)
    ends = torch.arange(1, number + 1, device=device(), dtype=torch.int32) * (rows // number)
    x8, w8 = to_fp8(x, E4M3), to_fp8(w, E4M3)
    scales = torch.ones(rows, device=device()), torch.ones(number, width, device=device())
    ways: dict[str, Callable[[], object]] = {
        "bf16": lambda: torch._grouped_mm(x, w.mT, offs=ends),
        "weight gradient, bf16": lambda: torch._grouped_mm(g.t(), x, offs=ends),
        "e4m3": lambda: torch._scaled_grouped_mm(x8, w8.mT, *scales, offs=ends, out_dtype=torch.bfloat16),
    }
    if device() == "cpu":
        del ways["e4m3"]
    return {name: 2 * rows * hidden * width / milliseconds(way) / 1e9 for name, way in ways.items()}


def head_gradient(rows: int, hidden: int, words: int) -> dict[str, float]:
    """Milliseconds to add a chunk's part of the head's gradient to the sum in fp32."""
    d_logits, x, total = randn(rows, words), randn(rows, hidden), torch.zeros(words, hidden, device=device())
    ways: dict[str, Callable[[], object]] = {"product, then sum": lambda: total.add_(d_logits.t() @ x)}
    if device() == "cuda":
        ways["in the product"] = lambda: torch.addmm(total, d_logits.t(), x, out_dtype=torch.float32, out=total)
    return {name: milliseconds(way) for name, way in ways.items()}


def copies(size: int) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=device())
    copy = torch.empty_like(source)
    return 2 * size / milliseconds(lambda: copy.copy_(source)) / 1e9


def attempted(part: Callable[..., Any], *args: Any) -> Any:
    """What a part finds, or its error."""
    try:
        return part(*args)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="each part once and small, on any device")
    sizes = TINY if parser.parse_args().tiny else FULL
    if sizes is FULL and (not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0)):
        sys.exit("this benchmark needs a GPU with FP8 and grouped products (compute capability 9.0 or newer), and there is none")
    torch.manual_seed(0)
    result = {
        "machine": machine(),
        "copy_terabytes_per_second": attempted(copies, sizes.copied),
        "products_teraflops": {str(p): attempted(products, *p) for p in sizes.products},
        "casts_terabytes_per_second_plain_and_compiled": attempted(casts, sizes.cast),
        "attention_teraflops": {str(a): attempted(attention, *a) for a in sizes.attentions},
        "experts_teraflops": attempted(experts, *sizes.experts),
        "head_gradient_milliseconds": attempted(head_gradient, *sizes.head),
    }
    write(__file__, "ceilings", result)


if __name__ == "__main__":
    main()
