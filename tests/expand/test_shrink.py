"""Shrinking: what growth added comes off again, importance beats chance, prefixes of a MatFormer are models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.growth.exactness import SEQ, grown_reader, random_state, reader, toy
from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.expand.grow import grow
from megascale.expand.importance import measure, ranked
from megascale.expand.options import GrowthOptions, Sizes
from megascale.expand.plan import plan_growth
from megascale.expand.shrink import Smaller, choose, plan_shrink, shrink, smaller_model
from megascale.expand.verify import run as run_model
from megascale.expand.write import Effort
from tests.layouts import Case, build, fake_batch
from tests.runs import make_tokens, run, settings

TOKENS = torch.randint(0, 37, (3, SEQ), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True, "norm_eps": 0.05},
        {"tie_embeddings": True},
        {"residual": "mus", "init_std": 0.02},
        {"residual": "post"},
        {"norm": "dyt"},
        {"norm": "dyt", "residual": "subln"},
        {"num_kv_heads": 4},
    ],
    ids=["pre", "qk", "tied", "mus", "post", "dyt", "inner dyt", "mha"],
)
def test_what_growth_added_comes_off_again(changes: dict[str, Any]) -> None:
    """Catches importance that ranks nothing above something, and gains or epsilons that are not undone: grown by zeros and shrunk by
    importance, the model is the first one.
    """
    model = toy(**changes)
    state = random_state(model)
    zero = GrowthOptions(width="zero", ffn="zero", heads="zero")
    sizes = Sizes(36, ffn_size=48) if changes.get("num_kv_heads") != 4 else Sizes(36, num_heads=6, ffn_size=48)
    growth = plan_growth(model, SEQ, sizes, zero)
    read = grown_reader(growth, state)
    grown_state = {t.name: read(t.name, (0,) * len(t.spec.shape), t.spec.shape) for t in growth.tensors}
    target = smaller_model(growth.target, Smaller(24, 4, model.num_kv_heads, 32))
    kept = choose(growth.target, target, measure(growth.target, SEQ, read, TOKENS, False), "importance", 0)
    assert kept.stream == list(range(24)) and kept.neurons == [list(range(32))] * 2
    back = plan_shrink(growth.target, SEQ, target, kept)
    assert back.target.norm_eps == pytest.approx(model.norm_eps, rel=1e-12)
    logits = [
        run_model(m, SEQ, r, torch.float64, TOKENS).logits
        for m, r in ((model, reader(state)), (back.target, grown_reader(back, grown_state)))
    ]
    assert (logits[0] - logits[1]).abs().max() < 1e-12


def test_ranking() -> None:
    """Catches an order upside down, and a permutation that moves what stays."""
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0])
    assert ranked(scores, 2, "importance", 0) == [0, 3]
    assert ranked(scores, 2, "reversed", 0) == [1, 2]
    assert ranked(scores, 3, "prefix", 0) == [0, 1, 2]
    assert len(set(ranked(scores, 3, "random", 0))) == 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MatFormer of 4 layers that has learned something."""
    folder = tmp_path_factory.mktemp("trained")
    make_tokens(folder / "tokens", 200)
    changes = {"num_layers": 4, "matformer": {"sizes": [8, 16]}}
    values = settings(folder, train__steps=60, train__global_batch_size=8, optim__lr=1e-2, **{f"model__{k}": v for k, v in changes.items()})
    assert run(values)[0] == 0
    return folder


QUICK = Effort(tokens=256)


def test_subcloning(trained: Path, tmp_path: Path) -> None:
    """Catches importance that is worse than chance, and a first or last block that is dropped."""
    losses = {}
    for ranking in ("importance", "reversed"):
        report = shrink(trained / "run", tmp_path / ranking, Smaller(18), ranking, 0, QUICK)
        losses[ranking] = report["proof"]["transform"]["loss"] + report["proof"]["transform"]["loss_change"]
        assert report["verdict"] == "lossy" and len(report["kept"]["stream"]) == 18
    assert losses["importance"] < losses["reversed"]
    report = shrink(trained / "run", tmp_path / "short", Smaller(num_layers=2, num_heads=2, num_kv_heads=1), "importance", 0, QUICK)
    assert report["kept"]["layers"] == [0, 3]
    values = settings(trained, model__num_layers=2, model__num_heads=2, model__num_kv_heads=1, model__head_dim=6, checkpoint__every=0)
    values["model"]["matformer"], values["run"]["dir"] = {"sizes": [8, 16]}, str(tmp_path / "run")
    values["checkpoint"]["init_from"] = str(tmp_path / "short")
    assert run(values)[0] == 0


def test_prefixes_of_a_matformer_are_models(trained: Path, tmp_path: Path) -> None:
    """Catches an extraction that is not what was trained: fused gates cut in one half, or other neurons; and Mix'n'Match across layers."""
    report = shrink(trained / "run", tmp_path / "small", Smaller(ffn_size=8), "importance", 0, QUICK)
    assert report["kept"]["neurons"] == [list(range(8))] * 4 and report["config"]["model.ffn_size"] == [32, 8]
    case = Case(toy(matformer={"sizes": [8]}))
    model = build(case, 1).model
    batch = fake_batch(case, [0])
    model.train(False)
    with torch.no_grad():
        inside = model._at_width(8, batch.tokens, None, None, None, None, 1.0, None)
        model._at_width(None, batch.tokens, None, None, None, None, 1.0, None)
        state = {n: p.detach() for n, p in model.named_parameters()}
        plan = plan_shrink(case.model, 12, smaller_model(case.model, Smaller(ffn_size=8)), choose_prefix(case.model, 8))
        outside = run_model(plan.target, 12, grown_reader(plan, state), torch.float64, batch.tokens).logits
    assert torch.equal(inside, outside)
    mixed = shrink(trained / "run", tmp_path / "mixed", Smaller(ffn_sizes=(32, 8, 16, 32)), "importance", 0, QUICK)
    assert [len(n) for n in mixed["kept"]["neurons"]] == [32, 8, 16, 32]
    assert mixed["parameters"]["target"] < mixed["parameters"]["source"]


def choose_prefix(model: Model, width: int) -> Any:
    return choose(model, smaller_model(model, Smaller(ffn_size=width)), None, "importance", 0)


@pytest.mark.parametrize("mode", ["sample", "sum"])
def test_nested_widths_are_trained_together(mode: str) -> None:
    """Catches a width that is never trained: sampling draws each by the step's number, summing trains all at once."""
    case = Case(toy(matformer={"sizes": [8, 16], "train": mode}))
    model = build(case, 1)
    batch = fake_batch(case, [0, 1])
    widths = set()
    for step in range(1, 13):
        model.at_step(step)
        widths.add(model.model.width)
    assert widths == ({8, 16, 32} if mode == "sample" else {None})
    model.train(True)
    total = model.module(batch.tokens, batch.targets)
    if mode == "sum":
        with torch.no_grad():
            each = [model.model._at_width(w, batch.tokens, batch.targets, None, None, None, 1.0, None) for w in (8, 16, 32)]
        assert total.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-14)
    total.backward()
    grad = model.model.blocks["0"].ffn.gate.weight.grad
    used = model.model.width if mode == "sample" else 32
    assert grad[:used].abs().sum() > 0 and not grad[used:].any()


@pytest.mark.parametrize(
    ("changes", "sizes", "words"),
    [
        ({}, Smaller(hidden_size=30), "shrinking does not grow"),
        ({}, Smaller(ffn_sizes=(8, 8)), "has no model.matformer"),
        ({"matformer": {"sizes": [8]}}, Smaller(ffn_size=12), "was not trained: model.matformer has 8, 32"),
        ({"matformer": {"sizes": [8]}}, Smaller(ffn_sizes=(8,)), "has 1 widths but the target 2 layers"),
        ({"moe": {"num_experts": 4, "ffn_size": 16}}, Smaller(ffn_size=16), "widths of experts"),
        ({"linear": "tokenformer", "tokenformer": {"tokens": 8}}, Smaller(hidden_size=12), "model.tokenformer is set"),
        ({"matformer": {"sizes": [8]}}, Smaller(ffn_size=8, ffn_sizes=(8, 32)), "give one of the two"),
        ({}, Smaller(num_heads=3), "query heads over"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], sizes: Smaller, words: str) -> None:
    """Catches a size that grows, a width that nobody trained, and parts that shrinking would cut wrongly."""
    with pytest.raises(UsageError) as error:
        smaller_model(toy(**changes), sizes)
    assert words in str(error.value)


def test_grown_and_shrunk_on_disk(trained: Path, tmp_path: Path) -> None:
    """Catches a command line that works in tests only."""
    grow(trained / "run", tmp_path / "grown", Sizes(36), GrowthOptions(width="zero"), QUICK)
    command = [sys.executable, "tools/shrink.py", str(tmp_path / "grown"), str(tmp_path / "back"), "--hidden-size", "24", "--tokens", "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "exact" in done.stdout, done.stderr
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr
