"""Muon's own settings, and NorMuon."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megascale.config.load import build_config
from megascale.config.schema import Muon, Optim
from megascale.model.spec import MATRICES
from megascale.optim.muon import orthogonalize, polynomials
from megascale.optim.optimizers import build_optimizer
from megascale.optim.rates import step_size
from megascale.train.estimate.memory import optimizer_bytes
from megascale.train.phases import goes_on
from tests.coordinates import moved
from tests.layouts import Case, build, tiny
from tests.ranks import run_ranks
from tests.runs import losses, make_tokens, run, settings, weights_at
from tests.test_optimizers import step, stepped

OWN = Muon(lr=0.05, momentum=0.7, nesterov=False, rounds=7, coefficients="polar_express", scale="spectral", weight_decay=0.3)


def test_polynomials_make_singular_values_one() -> None:
    """Catches a wrong coefficient, a set that ends too early, and rounds that are not those asked for."""
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))
    values = torch.logspace(-2.7, 0, 40, dtype=torch.float64)
    matrix = u @ torch.cat([torch.diag(values), torch.zeros(40, 20, dtype=torch.float64)], 1) @ v.T
    exact = torch.linalg.svdvals(orthogonalize(matrix, polynomials(Muon(coefficients="polar_express", rounds=9))))
    assert (exact - 1).abs().max() < 1e-6
    rough = torch.linalg.svdvals(orthogonalize(matrix, polynomials(Muon())))
    assert 0.1 < rough.min() < 0.9 and 1.1 < rough.max() < 1.3
    assert polynomials(Muon(coefficients=((1.5, -0.5, 0.0), (2.0, -1.0, 0.0)), rounds=3))[1:] == ((2.0, -1.0, 0.0),) * 2


def reference(case: Case, rows: bool) -> dict[str, Tensor]:
    """The matrices after the two updates of `stepped`, by the formulas."""
    own, found = case.optim.muon or Muon(), {}
    beta = case.optim.betas[0] if own.momentum is None else own.momentum
    rate = 0.01 if own.lr is None else 0.01 * own.lr / case.optim.lr
    decay = case.optim.weight_decay if own.weight_decay is None else own.weight_decay
    for w in build(case, 1).weights:
        if w.placement.spec.role not in MATRICES:
            continue
        p, m, v = w.local.clone(), torch.zeros_like(w.local), torch.zeros_like(w.local[:, :1])
        n, k = p.shape
        for _ in range(2):
            g = (p * 3 + 0.01) * 0.5
            m = beta * m + (1 - beta) * g
            x = orthogonalize((1 - beta) * g + beta * m if own.nesterov else m, polynomials(own))
            if rows:
                v = case.optim.betas[1] * v + (1 - case.optim.betas[1]) * (x**2).mean(1, keepdim=True)
                x = x / (v.sqrt() + 1e-10)
                x = x * min(n, k) ** 0.5 / x.norm()
            size = max(1.0, n / k) ** 0.5 if own.scale == "spectral" else 0.2 * max(n, k) ** 0.5
            p = p * (1 - rate * decay) - rate * size * x
        found[w.name] = p
    return found


@pytest.mark.parametrize("optim", [Optim(name="muon", muon=OWN), Optim(name="normuon"), Optim(name="normuon", muon=OWN)], ids=range(3))
def test_settings_and_rows_by_their_formulas(optim: Optim) -> None:
    """Catches a setting that is not read, AdamW's rate or decay on a matrix, and rows that are divided by another mean."""
    case = Case(tiny(ffn_size=48), optim=optim)
    found, plain = stepped(case), stepped(replace(case, optim=Optim()))
    expected = reference(case, rows=optim.name == "normuon")
    for name, p in found.items():
        torch.testing.assert_close(p, expected.get(name, plain[name]), rtol=1e-10, atol=1e-12)


def test_bytes_of_rows_are_counted() -> None:
    """Catches numbers of rows that the dry run forgets, and a bad step that changes them."""
    case = Case(tiny(), optim=Optim(name="normuon"))
    model = build(case, 1)
    optimizer = build_optimizer(model, case.optim)
    step(model, optimizer)
    before = optimizer.state()["row_sq"]["blocks.0.ffn.up.weight"].clone()
    step(model, optimizer, finite=False)
    assert torch.equal(optimizer.state()["row_sq"]["blocks.0.ffn.up.weight"], before) and before.min() > 0
    held = sum(x.nbytes for of in optimizer.state().values() for x in of.values())
    assert held == sum(optimizer_bytes(case.optim, w.placement, w.local.shape, 8) for w in model.weights)


def normuon(place: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    found = settings(place, optim__name="normuon", checkpoint__every=2, **changes)
    return {**found, "data": {"train": str(folder / "tokens")}, "optim": {**found["optim"], "muon": {"lr": 1e-2, "scale": "spectral"}}}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {"parallel__tp": 2}),
        pytest.param(4, {"parallel__tp": 2, "parallel__dp_shard": 2}, marks=pytest.mark.slow),
        pytest.param(3, {"parallel__dp_shard": 3}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel__pp": 2}, marks=pytest.mark.slow),
    ],
)
def test_rows_equal_one_process_and_resume(ranks: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Catches a mean over a part of a row, a norm over a part of a matrix, and rows that another layout takes for others."""
    make_tokens(tmp_path / "tokens", 200)
    batch = {"train__global_batch_size": 6, "model__ffn_size": 36}
    assert run(normuon(tmp_path, tmp_path, **batch)) == (0, "done")
    other = tmp_path / "other"
    assert {c for c, _ in run_ranks(ranks, run, normuon(other, tmp_path, **batch, **changes), 3)} == {75}
    assert run(normuon(other, tmp_path, **batch)) == (0, "done")
    assert max(abs(a - b) / b for a, b in zip(losses(other), losses(tmp_path), strict=True)) <= 1e-12
    here, there = weights_at(tmp_path, 6), weights_at(other, 6)
    assert here["optim.row_sq.blocks.0.ffn.down.weight"].shape == (24, 1)
    assert all((here[n] - there[n]).abs().max() <= 1e-12 for n in here if here[n].is_floating_point())


def test_muons_rate_goes_through_a_checkpoint() -> None:
    """Catches a phase that keeps the ratio of Muon's rate to a peak that changed."""
    plain = build_config({**Case(tiny(), optim=Optim(name="muon", muon=OWN)).config.plain()})
    faster = plain.model_copy(update={"optim": plain.optim.model_copy(update={"lr": 1e-3})})
    assert not goes_on(plain, faster)
    usual = [c.model_copy(update={"optim": c.optim.model_copy(update={"muon": None})}) for c in (plain, faster)]
    assert goes_on(*usual)


def mus(width: int, steps: int = 4, **muon: Any) -> Case:
    model = tiny(residual="mus", ffn="gelu", hidden_size=width, num_heads=width // 16, num_kv_heads=width // 16, ffn_size=4 * width)
    optim = Optim(name="muon", lr=1e-6, weight_decay=0.0, base_width=64, muon=Muon(**muon))
    return Case(model, optim=optim, precision="fp32", steps=steps, clip=0.0)


@pytest.mark.parametrize("width", [256, pytest.param(1024, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("scale", "rate"), [("match_adamw", 0.05), ("spectral", 0.01)])
def test_muon_under_unit_scaling_keeps_its_effect_over_widths(scale: Any, rate: float, width: int) -> None:
    """Catches a step that is not multiplied by what the product divides by, and one that follows base_width as Adam's. AdamW's weights
    stand still here.
    """
    narrow, wide = (moved(mus(n, 2, scale=scale, lr=rate)) for n in (64, width))
    assert narrow["last"] > 0.1
    assert 0.8 < wide["last"] / narrow["last"] < 1.25, (narrow, wide)


def test_step_sizes() -> None:
    """Catches another scale than the one named."""
    shape = (64, 16)
    assert step_size(Muon(), shape, True) == step_size(Muon(), shape, False) == 1.6
    assert [step_size(Muon(scale="spectral"), shape, unit) for unit in (False, True)] == [2.0, 8.0]
    assert [step_size(Muon(scale="none"), shape, unit) for unit in (False, True)] == [1.0, 4.0]
