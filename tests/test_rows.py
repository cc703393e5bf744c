"""Norms, feed-forwards and positions that a package beside ours would bring: one row each, and no other file is touched."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.growth.exactness import MOE, SEQ, measure, random_state, toy
from megascale.config.activations import ACTIVATIONS, ActivationRow
from megascale.config.load import build_config
from megascale.config.norms import NORMS, NormGrowth, NormRow
from megascale.config.positions import POSITIONS, PositionRow
from megascale.config.schema import Model, Parallel
from megascale.errors import UsageError
from megascale.expand.options import GrowthOptions, Sizes
from megascale.expand.plan import plan_growth
from megascale.expand.shrink import Smaller, smaller_model
from megascale.formats.megatron.tensor_names import Cut, check_model
from megascale.model.ops.norm_kernels import choose_kernels
from tests.layouts import Case, tiny, train, worst
from tests.ranks import run_ranks

# Divides by the mean size of the channels, has a bias and grows by its own power; φ is a square; tokens do not know where they stand.
L1NORM = NormRow(lambda x, mean, eps: x / (mean(x.abs()) + eps), growth=NormGrowth(1.0))
SQUARE = ActivationRow(lambda x: x.relu().square(), False, 1.5, 2.0, grows=True)
NOPE = PositionRow(grid=True, grows=True)
OURS = {"norm": "l1norm", "ffn": "relu2", "position": "nope", "bias": True}


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NORMS, "l1norm", L1NORM)
    monkeypatch.setitem(ACTIVATIONS, "relu2", SQUARE)
    monkeypatch.setitem(POSITIONS, "nope", NOPE)


@pytest.mark.dist
@pytest.mark.parametrize("residual", ["pre", "subln"])
def test_new_rows_train_alike_on_every_layout(residual: str) -> None:
    """Catches a norm whose statistics are of this rank's channels alone, and a module that knows no other than our own rows."""
    case = Case(tiny(**OURS, residual=residual, qk_norm="width"), steps=2)
    alone = train(case)
    cut = run_ranks(2, train, replace(case, parallel=Parallel(tp=2, tp_sequence=True)))[0]
    assert cut["loss"] == pytest.approx(alone["loss"], rel=1e-12)
    assert worst(cut["grad"], alone["grad"])[0] < 1e-10
    assert "blocks.0.attention_norm.bias" in alone["grad"] and "position.weight" not in alone["grad"]


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, Sizes(hidden_size=36, ffn_size=40, num_layers=3)),
        ({"qk_norm": True}, Sizes(head_dim=12, num_heads=8)),
        ({"qk_norm": True, "bias": False}, Sizes(head_dim=8)),
        ({"residual": "post"}, Sizes(num_layers=4, hidden_size=48)),
        ({"residual": "subln"}, Sizes(ffn_size=64)),
        ({"moe": MOE, "bias": False}, Sizes(experts=8)),
    ],
    ids=["width and depth", "heads", "channels", "behind the sum", "inner norms", "experts"],
)
def test_new_rows_grow_as_they_say(changes: dict[str, Any], sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gains and epsilons of a root mean square under a norm that takes another mean."""
    if not changes.get("bias", True):
        monkeypatch.setitem(NORMS, "l1norm", replace(L1NORM, bias=False))
    growth = plan_growth(toy(**{**OURS, **changes}), SEQ, sizes, GrowthOptions())
    assert measure(growth, random_state(growth.source))["logits_max"] < 1e-10


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("norm", "model.norm is l1norm, whose row does not say"),
        ("ffn", "model.ffn is relu2, whose row"),
        ("position", "model.position is nope"),
    ],
)
def test_rows_that_do_not_say_how_they_grow_keep_their_sizes(key: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a norm that grows as if it were RMSNorm because nobody asked."""
    monkeypatch.setitem(NORMS, "l1norm", replace(L1NORM, growth=None))
    monkeypatch.setitem(ACTIVATIONS, "relu2", replace(SQUARE, grows=False))
    monkeypatch.setitem(POSITIONS, "nope", replace(NOPE, grows=False))
    for change in (lambda m: plan_growth(m, SEQ, Sizes(hidden_size=48), GrowthOptions()), lambda m: smaller_model(m, Smaller(16))):
        with pytest.raises(UsageError, match=words):
            change(toy(**{key: OURS[key]}))


def test_rules_kernels_and_formats_read_the_row() -> None:
    """Catches a name that is asked where a fact should be, and an unknown name without the nearest known one."""
    sizes = {"num_layers": 1, "hidden_size": 12, "num_heads": 2, "vocab_size": 8}

    def built(**model: Any) -> Model:
        return build_config({"model": {**sizes, **model}, "train": {"steps": 1}, "data": {"train": "x"}}).model

    assert built(**OURS).norm_row is L1NORM and built(ffn="relu2").ffn_size == 48
    with pytest.raises(UsageError, match=r"model.norm is 'l1nrom': it should be 'rmsnorm', .* or 'l1norm'; did you mean l1norm\?"):
        built(norm="l1nrom")
    with pytest.raises(UsageError, match=r"model.position is '\{x\}': it should be 'rope', .* or 'nope'"):
        built(position="{x}")
    with pytest.raises(ValueError, match="the power of a norm's growth is 0"):
        NormGrowth(0)
    for wrong in (3, ["rope"], {"rope": 1}, None):
        with pytest.raises(UsageError, match=r"model.ffn is .*"):
            built(ffn=wrong)
    with pytest.raises(UsageError, match=r"model.norm is 'l1norm', but megatron-core's GPT model"):
        check_model(built(norm="l1norm"), Cut(1, 1, "te", 8))
    with pytest.raises(UsageError, match=r"run.kernels is te but te does not have model.norm l1norm"):
        choose_kernels("te", "l1norm", torch.device("cuda"))
    assert {"l1norm"} < set(Model.model_json_schema()["properties"]["norm"]["enum"])


def test_nobody_asks_for_a_name() -> None:
    """Catches the next `if cfg.norm == …`: what it wants to know belongs into the row."""
    tables: dict[str, dict[str, Any]] = {"norm": NORMS, "ffn": ACTIVATIONS, "position": POSITIONS}
    asked = []
    for path in [*Path("megascale").rglob("*.py"), *Path("tools").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr in tables:
                words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                asked += [f"{path}:{node.lineno}"] if words & tables[node.left.attr].keys() else []
    assert not asked
