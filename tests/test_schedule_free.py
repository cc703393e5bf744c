"""Schedule-free AdamW: the published algorithm, and an average in place of the weights wherever a model is judged or used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.config.schema import Optim
from megascale.expand.merge import merge
from megascale.expand.write import Effort
from megascale.formats.sources import open_checkpoint
from megascale.optim.averages import own_average, shown
from megascale.optim.optimizers import build_optimizer
from megascale.train.estimate.memory import optimizer_bytes
from tests.layouts import Case, build, tiny
from tests.ranks import run_ranks
from tests.runs import losses, make_tokens, rows, run, settings, weights_at
from tests.test_averages import loss_of
from tests.test_optimizers import step

OPTIM = Optim(name="schedule_free", betas=(0.9, 0.99), decay="constant", weight_decay=0.2, eps=1e-6)
CASE = Case(tiny(), optim=OPTIM.model_copy(update={"multipliers": Optim(multipliers={"head.weight": {"lr": 0.5}}).multipliers}))  # type: ignore[dict-item]


def test_it_is_the_published_algorithm() -> None:
    """Catches another share, rate, decay or bias correction than in algorithm 1 of arXiv 2405.15682, followed here with x, y and z as they
    stand there; gradients depend on y, so that an error grows. A step that is not finite changes nothing.
    """
    model = build(CASE, 1)
    optimizer = build_optimizer(model, CASE.optim)
    start = {w.name: w.local.clone() for w in model.weights}
    for _ in range(3):
        step(model, optimizer)
    held = {key: {n: x.clone() for n, x in of.items()} for key, of in optimizer.state().items()}
    before = [w.local.clone() for w in model.weights]
    step(model, optimizer, finite=False)
    assert all(torch.equal(x, held[key][n]) for key, of in optimizer.state().items() for n, x in of.items())
    assert all(torch.equal(w.local, x) for w, x in zip(model.weights, before))
    for _ in range(3):
        step(model, optimizer)
    found = {w.name: w.local.clone() for w in model.weights}
    with shown(model, optimizer.state(), own_average(CASE.optim)):
        judged = {w.name: w.local.clone() for w in model.weights}
    (beta, second), eps = CASE.optim.betas, CASE.optim.eps
    for w in model.weights:
        x = z = start[w.name]
        v, squares = torch.zeros_like(x), 0.0
        decay = 0.2 if w.placement.spec.decays else 0.0
        for t in range(1, 7):
            y = (1 - beta) * z + beta * x
            g = (y * 3 + 0.01) * 0.5
            v = second * v + (1 - second) * g * g
            rate = 0.01 * (0.5 if w.name == "head.weight" else 1.0) * (1 - second**t) ** 0.5
            z = z - rate * (g / (v.sqrt() + eps)) - rate * decay * y
            squares += rate**2
            c = rate**2 / squares
            x = (1 - c) * x + c * z
        torch.testing.assert_close(found[w.name], (1 - beta) * z + beta * x, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(judged[w.name], x, rtol=1e-12, atol=1e-13)
    state = sum(t.nbytes for of in optimizer.state().values() for t in of.values())
    assert state == sum(optimizer_bytes(CASE.optim, w.placement, w.local.shape, 8) for w in model.weights)


def values(folder: Path, place: Path | None = None, **changes: Any) -> dict[str, Any]:
    found = settings(folder if place is None else place, train__eval_every=3, train__eval_steps=2, data__valid_fraction=0.2, **changes)
    found["data"]["train"] = str(folder / "tokens")
    return {**found, "optim": {"name": "schedule_free", "lr": 0.03, "decay": "constant", "warmup_steps": 2}}


@pytest.mark.dist
def test_runs_resume_grow_and_are_used_at_the_average(tmp_path: Path) -> None:
    """Catches an evaluation, an export, a merge or a new run at the weights where gradients are taken, a resume on another layout that
    forgets how far the average is, and a growth that moves it.
    """
    make_tokens(tmp_path / "tokens", 200)
    assert run(values(tmp_path)) == (0, "done")
    there = tmp_path / "there"
    assert run(values(tmp_path, there), stop_at=3)[0] == 75
    tp = {"parallel__tp": 2, "parallel__dp_shard": 1}
    assert {code for code, _ in run_ranks(2, run, values(tmp_path, there, **tp))} == {0}
    assert losses(there) == pytest.approx(losses(tmp_path), rel=1e-12)
    assert rows(there)[-1]["valid_loss"] == pytest.approx(rows(tmp_path)[-1]["valid_loss"], rel=1e-12)
    checkpoints = tmp_path / "run" / "checkpoints"
    x = {}
    for number in (3, 6):
        found = weights_at(tmp_path, number)
        lead = {n.removeprefix("optim.lead."): t for n, t in found.items() if n.startswith("optim.lead.")}
        x[number] = {n: found[f"model.{n}"] - t / 9 for n, t in lead.items()}
    source = open_checkpoint(checkpoints / "step-00000006").source
    for name, t in x[6].items():
        assert (source.read(f"model.{name}", (0,) * t.ndim, tuple(t.shape)) - t).abs().max() <= 1e-15
    merge([checkpoints / f"step-0000000{n}" for n in (3, 6)], tmp_path / "merged", None, Effort())
    merged = open_checkpoint(tmp_path / "merged").source
    for name, t in x[3].items():
        assert (merged.read(f"model.{name}", (0,) * t.ndim, tuple(t.shape)) - (t + x[6][name]) / 2).abs().max() <= 1e-15
    begun = values(tmp_path, tmp_path / "begun")
    begun["train"] |= {"steps": 1, "eval_every": 1}
    begun["optim"]["lr"] = 1e-12  # so that its first evaluation is that of what it began with
    assert run({**begun, "checkpoint": {"init_from": str(checkpoints / "step-00000006")}}) == (0, "done")
    assert rows(tmp_path / "begun")[0]["valid_loss"] == pytest.approx(rows(tmp_path)[-1]["valid_loss"], rel=1e-9)

    growth = {"step": 3, "hidden_size": 48, "num_heads": 8, "num_kv_heads": 4, "ffn_size": 64, "num_layers": 3, "symmetry": "none"}
    deep = tmp_path / "deep"
    grown = {**values(tmp_path, deep), "grow": [growth]}
    assert run(grown) == (0, "done")
    small = deep / "run" / "checkpoints" / "step-00000003"
    assert loss_of(deep / "run" / "grown-1") == pytest.approx(loss_of(small), rel=1e-9)
    assert len(rows(deep)) == 6


def test_a_reset_begins_the_average_at_the_weights() -> None:
    """Catches a state of zeros that is taken for a place far away: x, y and z are the same at the start."""
    model = build(replace(CASE, optim=OPTIM), 1)
    optimizer = build_optimizer(model, OPTIM)
    weights = [w.local.clone() for w in model.weights]
    with shown(model, optimizer.state(), own_average(OPTIM)):
        assert all(torch.equal(w.local, x) for w, x in zip(model.weights, weights))
