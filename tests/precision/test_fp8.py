"""Casts against a table, products against fp64, gradients against their formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megascale.model.ops.compiled import compile_static
from megascale.precision.fp8 import E4M3, E5M2, LARGEST, HeldFp8, fp8_grouped, fp8_linear, fp8_product, to_fp8, weight_gradient

# How the formats are laid out: bias of the exponent, bits of the mantissa.
FORMATS = {E4M3: (7, 3), E5M2: (15, 2)}


def every_value(dtype: torch.dtype) -> dict[int, float]:
    """Bits of every non-negative finite number → its value, from the format's definition."""
    bias, mantissa_bits = FORMATS[dtype]
    found = {}
    for bits in range(128):
        exponent, mantissa = bits >> mantissa_bits, bits & ((1 << mantissa_bits) - 1)
        if exponent == 0:
            value = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        if value <= LARGEST[dtype]:
            found[bits] = value
    return found


def rounded(x: float, dtype: torch.dtype) -> int:
    """Bits of the nearest number to |x|, ties to the even one, beyond the largest the largest."""
    table = every_value(dtype)
    return min(table, key=lambda bits: (abs(table[bits] - min(abs(x), LARGEST[dtype])), bits & 1))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_casts_bit_for_bit(dtype: torch.dtype, source: torch.dtype) -> None:
    """Catches truncation, ties away from even, subnormals flushed to zero, and overflow to infinity (e5m2 from 61440) or NaN (e4m3)."""
    table = every_value(dtype)
    values = sorted(table.values())
    between = [(a + b) / 2 for a, b in pairwise(values)]
    around = [m * (1 + s) for m in between for s in (-0.004, 0.004)]
    beyond = [LARGEST[dtype] * f for f in (1.01, 1.07, 1.1, 2.0, 1e6)] + [math.inf, values[1] * 0.499, values[1] * 0.26]
    x = torch.tensor(values + between + around + beyond).to(source)
    for signed, flag in ((x, 0), (-x, 128)):
        found = to_fp8(signed, dtype).view(torch.uint8).tolist()
        assert found == [rounded(float(v), dtype) | flag for v in x]
    assert to_fp8(torch.tensor([math.nan], dtype=source), dtype).to(torch.float32).isnan().all()


@pytest.mark.slow
def test_the_compiled_cast_is_the_same() -> None:
    """Catches a compiler that fuses the clamp away or rounds twice."""
    torch.manual_seed(0)
    x = torch.randn(4096) * torch.logspace(-7, 6, 4096)
    for dtype in (E4M3, E5M2):
        compiled = compile_static(to_fp8)(x, dtype)
        assert torch.equal(compiled.view(torch.uint8), to_fp8(x, dtype).view(torch.uint8))


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 4), k=st.integers(1, 6), first=st.sampled_from([E4M3, E5M2]), seed=st.integers(0, 99))
def test_products_against_fp64(m: int, n: int, k: int, first: torch.dtype, seed: int) -> None:
    """Catches a factor on the wrong side, a scale that is rounded before it is applied, and sums in less than fp32.

    The bound: fp32 sums of k terms err by at most k·2⁻²⁴ of the sum of the terms' sizes, the scale and the result by one rounding each.
    """
    generator = torch.Generator().manual_seed(seed)
    a = to_fp8(torch.randn(m, 16 * k, generator=generator), first)
    b = to_fp8(torch.randn(16 * n, 16 * k, generator=generator), E4M3)
    scale = 1 / math.sqrt(16 * k)
    wide_a, wide_b = a.to(torch.float64), b.to(torch.float64)
    exact, size = scale * wide_a @ wide_b.t(), scale * wide_a.abs() @ wide_b.abs().t()
    found = fp8_product(a, b, scale, torch.float32).to(torch.float64)
    assert ((found - exact).abs() <= (16 * k + 2) * 2**-24 * size + 1e-30).all()
    half = fp8_product(a, b, scale, torch.bfloat16)
    assert torch.equal(half, fp8_product(a, b, scale, torch.float32).to(torch.bfloat16))


def test_torchs_own_product_agrees() -> None:
    """Catches a path for CPUs that computes something else than `torch._scaled_mm`, which devices use."""
    torch.manual_seed(0)
    for first in (E4M3, E5M2):
        a, b = to_fp8(torch.randn(48, 64), first), to_fp8(torch.randn(32, 64), E4M3)
        one = torch.ones(())
        theirs = torch._scaled_mm(a, b.t(), scale_a=one * 0.125, scale_b=one, out_dtype=torch.float32)
        torch.testing.assert_close(fp8_product(a, b, 0.125, torch.float32), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.zeros(4, 24, dtype=E4M3), torch.zeros(16, 24, dtype=E4M3), "multiples of 16"),
        (torch.zeros(4, 16, dtype=E4M3), torch.zeros(8, 16, dtype=E4M3), "multiples of 16"),
        (torch.zeros(4, 16, dtype=E5M2), torch.zeros(16, 16, dtype=E5M2), "not torch.float8_e5m2 times torch.float8_e5m2"),
        (torch.zeros(16, 32, dtype=E4M3), torch.zeros(32, 16, dtype=E4M3).t(), "contiguous rows"),
    ],
)
def test_what_cuda_would_refuse(a: Tensor, b: Tensor, words: str) -> None:
    """Catches a program that runs here and fails on the first device."""
    with pytest.raises(ValueError, match=words):
        fp8_product(a, b, 1.0, torch.float32)


def gradients(x: Tensor, w: Tensor, g: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Result, input gradient and weight gradient by the definition: three products of what was cast once."""
    x8, w8, g8 = (to_fp8(t, d).to(torch.float64) for t, d in ((x, E4M3), (w, E4M3), (g, E5M2)))
    return scale * x8 @ w8.t(), scale * g8 @ w8, scale * g8.t() @ x8


def test_linear_and_its_gradients() -> None:
    """Catches a gradient in e4m3, a product of uncast factors, a scale that one of the three lacks, and weights cast past bf16."""
    torch.manual_seed(0)
    x, g, scale = torch.randn(3, 8, 32) * 3, torch.randn(3, 8, 48) * 100, 0.3
    w = torch.randn(48, 32, requires_grad=True)
    x.requires_grad_()
    y = fp8_linear(x, w, scale)
    y.backward(g)
    expected = gradients(x.detach().flatten(0, 1), w.detach(), g.flatten(0, 1), scale)
    for found, wanted in zip((y.flatten(0, 1), x.grad.flatten(0, 1), w.grad), expected):  # type: ignore[union-attr]
        torch.testing.assert_close(found.to(torch.float64), wanted, atol=1e-3, rtol=1e-5)
    # In bf16 a weight is rounded twice on every path alike; this one lies where that shows.
    tie = torch.full((16, 16), 1.0625 + 2**-12)
    x16 = torch.eye(16, dtype=torch.bfloat16)
    assert (fp8_linear(x16, tie, 1.0) == 1.0).all() and (fp8_linear(x16.float(), tie, 1.0) == 1.125).all()


def test_rows_of_any_number() -> None:
    """Catches a weight gradient that needs tokens in multiples of 16, and padding that counts."""
    torch.manual_seed(0)
    g, x = torch.randn(7, 16), torch.randn(7, 32)
    found = weight_gradient(to_fp8(g, E5M2), to_fp8(x, E4M3), 1.0, torch.float32)
    torch.testing.assert_close(found, to_fp8(g, E5M2).float().t() @ to_fp8(x, E4M3).float())


def test_experts_one_by_one() -> None:
    """Catches rows that go to a neighbour's expert, an empty expert that stops the loop, and rows of nobody that are not zero."""
    torch.manual_seed(0)
    counts = torch.tensor([3, 0, 5])
    x, w = torch.randn(10, 16, requires_grad=True), torch.randn(3, 32, 16, requires_grad=True)
    y = fp8_grouped(x, w, counts, 0.25)
    g = torch.randn(10, 32)
    y.backward(g)
    begin = 0
    for expert, size in enumerate(counts.tolist()):
        rows = slice(begin, begin + size)
        expected = gradients(x.detach()[rows], w.detach()[expert], g[rows], 0.25)
        assert x.grad is not None and w.grad is not None
        for found, wanted in zip((y[rows], x.grad[rows], w.grad[expert]), expected):
            torch.testing.assert_close(found.to(torch.float64), wanted, atol=1e-4, rtol=1e-5)
        begin += size
    assert (y[8:] == 0).all() and (x.grad[8:] == 0).all()


def test_a_held_weight_is_the_weight() -> None:
    """Catches a gathered weight that is cast again from something else, or that shows its bytes to operations that know nothing of it."""
    torch.manual_seed(0)
    w = torch.randn(32, 16)
    held = torch.nn.Parameter(HeldFp8(to_fp8(w, E4M3), torch.float32))
    x = torch.randn(4, 16)
    plain = w.clone().requires_grad_()
    for weight in (held, plain):
        fp8_linear(x, weight, 0.5).square().sum().backward()
    assert held.grad is not None and plain.grad is not None
    assert torch.equal(held.grad, plain.grad) and held.grad.dtype == torch.float32
    assert torch.equal(held[3:5].detach(), to_fp8(w, E4M3).float()[3:5])


class Products(torch.nn.Module):
    """Two products with an activation between."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Parameter(first), torch.nn.Parameter(second)

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(torch.nn.functional.gelu(fp8_linear(x, self.first, 0.2)), self.second, 0.1)


@pytest.mark.parametrize("held", [False, True])
def test_one_graph(held: bool) -> None:
    """Catches a graph break (`fullgraph` raises), and casts that a compiler makes into something else."""
    torch.manual_seed(0)
    weights = torch.randn(64, 32), torch.randn(32, 64)
    if held:
        weights = tuple(HeldFp8(to_fp8(w, E4M3), torch.float32) for w in weights)  # type: ignore[assignment]
    model, x = Products(*weights), torch.randn(2, 16, 32)
    found = []
    for forward in (model, compile_static(model, fullgraph=True)):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        y = forward(inputs)
        y.square().sum().backward()
        assert model.first.grad is not None and model.second.grad is not None and inputs.grad is not None
        found.append([y.detach(), inputs.grad, model.first.grad.clone(), model.second.grad.clone()])
    for eager, compiled in zip(*found):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)
