"""One GPU gives what one CPU process gives. `pytest -m gpu` where a device is at hand; docs/gpu.md says what has run on which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import operators
from megascale.precision.fp8 import E4M3, E5M2, fp8_product, to_fp8
from tests.runs import make_tokens, rows, run, settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device")]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", operators.checks())
def test_gpu_equals_cpu(name: str) -> None:
    """Catches a kernel or a compiled graph that computes something else; bounds are the rounding of the dtype over five steps."""
    torch.manual_seed(0)
    operators.checks()[name](CUDA)


@pytest.mark.parametrize("first", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_products(first: torch.dtype, dtype: torch.dtype) -> None:
    """Catches sums in less than 14 bits, as Hopper's fast accumulation has them, and casts that differ. FP8's own rounding is not in it:
    both factors are exact.
    """
    torch.manual_seed(0)
    x, w = torch.randn(96, 512) * 30, torch.randn(64, 512)
    a, b = to_fp8(x, first), to_fp8(w, E4M3)
    assert torch.equal(to_fp8(x.cuda(), first).cpu().view(torch.uint8), a.view(torch.uint8))
    exact = a.to(torch.float64) @ b.to(torch.float64).t() * 0.3
    got = fp8_product(a.cuda(), b.cuda(), 0.3, dtype).cpu().to(torch.float64)
    bound = 2**-8 if dtype == torch.bfloat16 else 2**-12
    assert (got - exact).norm() / exact.norm() <= bound


def test_a_whole_run_on_a_gpu(tmp_path: Path) -> None:
    """Catches host-only code in the loop: stop, asynchronous save from device memory, resume, metrics read one step late."""
    make_tokens(tmp_path / "tokens")
    values: dict[str, Any] = settings(tmp_path, run__device="cuda", precision__compute="bf16", train__steps=8)
    assert run(values, 3)[0] == 75
    assert run(values) == (0, "done")
    assert [r["step"] for r in rows(tmp_path)] == list(range(1, 9))
    assert rows(tmp_path)[-1]["memory_bytes"] > 0
