"""One GPU gives what one CPU process gives. `pytest -m gpu` where a device is at hand; docs/gpu.md says what has run on which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.config.schema import Model, Optim, Parallel
from megascale.config.schema.model import Moe
from megascale.precision.fp8 import E4M3, E5M2, fp8_grouped, fp8_product, to_fp8
from megascale.train.build import build_engine
from megascale.train.engines.engine import backward, update
from tests.layouts import CPU, Case, build, fake_batch, tiny
from tests.runs import make_tokens, rows, run, settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device")]
CUDA = torch.device("cuda")
# Kernels of attention want heads of 16 channels, products rows of 16 bytes.
WIDE: dict[str, Any] = {"hidden_size": 64, "ffn_size": 128, "vocab_size": 96}
MOE = Moe(num_experts=4, top_k=2, ffn_size=64)


def losses_on(device: torch.device, case: Case) -> list[float]:
    model = build(case, 1, device)
    engine = build_engine(model, case.config, device)
    losses = []
    for step in range(case.steps):
        numbers = list(range(step * case.batch, (step + 1) * case.batch))
        batches = [fake_batch(case, numbers[i : i + case.micro_batch]) for i in range(0, case.batch, case.micro_batch)]
        batches = [b._replace(**{k: v.to(device) for k, v in b._asdict().items() if isinstance(v, torch.Tensor)}) for b in batches]
        sums = backward(engine, batches, 1 / (case.batch * case.seq_len), case.optim.lr)
        losses.append(update(engine, sums).loss.item())
    return losses


def model(**changes: Any) -> Model:
    return tiny(**{**WIDE, **changes})


CASES = {
    "plain": Case(tiny(dropout=0.1)),
    "wide": Case(model(dropout=0.1)),
    "tied, layernorm": Case(model(tie_embeddings=True, norm="layernorm", bias=True, ffn="gelu", position="learned", residual="post")),
    "deepnorm": Case(model(residual="deepnorm")),
    "branchnorm, dyt": Case(model(residual="branchnorm", branchnorm_period=3, norm="dyt")),
    "documents": Case(model(), packed=True, seq_len=160),
    "alibi, window": Case(model(position="alibi", sliding_window=40), seq_len=160),
    "experts": Case(model(moe=MOE)),
    "experts, biases, capacity": Case(model(moe=MOE.model_copy(update={"balance": "bias", "capacity_factor": 1.0, "num_shared": 1}))),
    "encoder": Case(model(family="encoder")),
    "layered": Case(model(), Parallel(accumulation="layered")),
    "recomputed": Case(model(), Parallel(recompute="selective")),
    "recomputed in full": Case(model(), Parallel(recompute="full")),
    "offloaded": Case(model(), Parallel(offload=("optimizer", "activations"))),
    "muon": Case(model(), optim=Optim(name="muon", lr=1e-3)),
    "lion": Case(model(), optim=Optim(name="lion", lr=1e-4)),
    "unit-scaled": Case(model(residual="mus", ffn="gelu", init_std=1.0)),
    "unit-scaled experts": Case(model(residual="mus", ffn="gelu", init_std=1.0, moe=MOE)),
}
COMPILED = {"plain", "wide", "documents", "experts", "recomputed", "unit-scaled", "deepnorm"}


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("bf16", 3e-2)])
@pytest.mark.parametrize(("name", "compiled"), [*((name, False) for name in CASES), *((name, True) for name in sorted(COMPILED))])
def test_gpu_equals_cpu(name: str, precision: str, bound: float, compiled: bool) -> None:
    """Catches a kernel or a compiled graph that computes something else; bounds are the rounding of the dtype over five steps."""
    case = replace(CASES[name], precision=precision, steps=5, micro_batch=2, seq_len=max(16, CASES[name].seq_len))
    reference = losses_on(CPU, case)
    got = losses_on(CUDA, replace(case, parallel=case.parallel.model_copy(update={"compile": compiled})))
    assert max(abs(a - b) / b for a, b in zip(got, reference)) <= bound, (got, reference)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["unit-scaled", "unit-scaled experts"])
def test_fp8_equals_the_cpus(name: str, compiled: bool) -> None:
    """Catches a factor cast or scaled otherwise than on CPUs, where FP8 is computed bit by bit; the bound is that of bf16, in which the
    streams are added up.
    """
    case = replace(CASES[name], precision="bf16", fp8="static", loss_scale=1.0, steps=5, micro_batch=2, seq_len=16)
    reference = losses_on(CPU, case)
    got = losses_on(CUDA, replace(case, parallel=Parallel(compile=compiled)))
    assert max(abs(a - b) / b for a, b in zip(got, reference)) <= 3e-2, (got, reference)


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


def test_fp8_of_experts() -> None:
    """Catches rows given to another expert, experts without rows, and a gradient that lacks the scale."""
    torch.manual_seed(0)
    counts = torch.tensor([5, 0, 27, 16])
    x, w, g = torch.randn(48, 64), torch.randn(4, 32, 64), torch.randn(48, 32)
    found = []
    for device in (CPU, CUDA):
        mine = [t.to(device, torch.bfloat16).requires_grad_() for t in (x, w)]
        y = fp8_grouped(mine[0], mine[1], counts.to(device), 0.25)
        found.append([y, *torch.autograd.grad(y, mine, g.to(device, torch.bfloat16))])
    for ours, theirs in zip(*found):
        assert (ours - theirs.cpu()).norm() / ours.norm() <= 2**-7


def test_a_whole_run_on_a_gpu(tmp_path: Path) -> None:
    """Catches host-only code in the loop: stop, asynchronous save from device memory, resume, metrics read one step late."""
    make_tokens(tmp_path / "tokens")
    values: dict[str, Any] = settings(tmp_path, run__device="cuda", precision__compute="bf16", train__steps=8)
    assert run(values, 3)[0] == 75
    assert run(values) == (0, "done")
    assert [r["step"] for r in rows(tmp_path)] == list(range(1, 9))
    assert rows(tmp_path)[-1]["memory_bytes"] > 0
