"""One GPU gives what one CPU process gives. `pytest -m gpu` where a device is at hand; see the README for what has run on which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.config.schema import Parallel
from megascale.model.decoder import Decoder, Shape
from megascale.model.kernels import torch_rmsnorm
from megascale.optim.clip import clip_factor, global_norm
from megascale.optim.optimizers import build_optimizer
from megascale.parallel.apply import parallelize
from megascale.schedule.accumulate import Accumulation
from tests.layouts import DTYPES, Case, fake_batch, tiny
from tests.runs import make_tokens, rows, run, settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device")]


def losses_on(device: torch.device, case: Case) -> list[float]:
    from megascale.comm.mesh import AXES, build_mesh

    mesh = build_mesh(dict.fromkeys(AXES, 1), device.type)
    shape = Shape(case.seq_len, torch.float32, DTYPES[case.precision])
    model = parallelize([Decoder(case.model, shape, torch_rmsnorm)], mesh, case.parallel, device)
    for _ in model.draw_weights(7):
        pass
    optimizer = build_optimizer(model, case.optim)
    losses = []
    for step in range(case.steps):
        batch = fake_batch(case, list(range(step * case.batch, (step + 1) * case.batch)))
        batch = batch._replace(**{k: v.to(device) for k, v in batch._asdict().items() if isinstance(v, torch.Tensor)})
        losses.append(Accumulation(model).run([batch], 1 / batch.valid).item())
        norm = global_norm(model.weights, 1)
        optimizer.step(1e-3, clip_factor(norm, 1.0), torch.isfinite(norm))
        for w in model.weights:
            w.parameter.grad = None
    return losses


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("bf16", 3e-2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_equals_cpu(precision: str, bound: float, compiled: bool) -> None:
    """Catches a kernel or a compiled graph that computes something else; bounds are the rounding of the dtype over five steps."""
    case = Case(tiny(dropout=0.1), precision=precision, steps=5, seq_len=16)
    reference = losses_on(torch.device("cpu"), case)
    got = losses_on(torch.device("cuda"), replace(case, parallel=Parallel(compile=compiled)))
    assert max(abs(a - b) / b for a, b in zip(got, reference)) <= bound


def test_a_whole_run_on_a_gpu(tmp_path: Path) -> None:
    """Catches host-only code in the loop: stop, asynchronous save from device memory, resume, metrics read one step late."""
    make_tokens(tmp_path / "tokens")
    values: dict[str, Any] = settings(tmp_path, run__device="cuda", precision__compute="bf16", train__steps=8)
    assert run(values, 3)[0] == 75
    assert run(values) == (0, "done")
    assert [r["step"] for r in rows(tmp_path)] == list(range(1, 9))
    assert rows(tmp_path)[-1]["memory_bytes"] > 0
