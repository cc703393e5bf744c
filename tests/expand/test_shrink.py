"""Shrinking: what growth added comes off again, importance beats chance, prefixes of a MatFormer are models."""

from __future__ import annotations

import math
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
from megascale.expand.inner import inner_sizes
from megascale.expand.options import GrowthOptions, Sizes, kinds_of
from megascale.expand.plan import plan_growth
from megascale.expand.shrink import choose, plan_shrink, shrink
from megascale.expand.smaller import Smaller, cheapest_layers, removable, smaller_model, turn_of
from megascale.expand.verify import run as run_model
from megascale.expand.write import Effort
from tests.expand.test_kinds_growth import LATENT, MODELS
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
        {"num_kv_heads": 4, **{k: v for k, v in LATENT.items() if k != "num_kv_heads"}},
        {"mtp_depth": 2, "tie_embeddings": True, "norm_eps": 0.05},
        {"residual": "sandwich", "norm": "rmsnorm_1p"},
        {"kinds": {"a": {"sliding_window": 5}, "b": {"position": "none", "qk_norm": True}}, "pattern": ["a", "b"], "mtp_depth": 1},
    ],
    ids=["pre", "qk", "tied", "mus", "post", "dyt", "inner dyt", "mha", "latent", "mtp", "sandwich", "kinds"],
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
    kept = choose(growth.target, target, measure(growth.target, SEQ, read, TOKENS, None), "importance", 0)
    assert kept.stream == list(range(24)) and kept.neurons == [list(range(32))] * (2 + model.mtp_depth)
    back = plan_shrink(growth.target, SEQ, target, kept)
    assert back.target.norm_eps == pytest.approx(model.norm_eps, rel=1e-12)
    first, again = (
        run_model(m, SEQ, r, torch.float64, TOKENS) for m, r in ((model, reader(state)), (back.target, grown_reader(back, grown_state)))
    )
    for a, b in zip((first.logits, *first.ahead), (again.logits, *again.ahead), strict=True):
        assert (a - b).abs().max() < 1e-12 * max(1.0, a.std().item())


@pytest.mark.parametrize("name", ["deepseek", "gpt-oss", "qwen3-next", "gemma"])
def test_todays_models_shrink(name: str) -> None:
    """Catches a part of a model without its map to fewer channels: experts' biases, sinks, gates, latents, convolutions, modules."""
    model = toy(**MODELS[name])
    state = random_state(model)
    growth = plan_growth(model, SEQ, Sizes(36), GrowthOptions(width="zero"))
    read = grown_reader(growth, state)
    grown_state = {t.name: read(t.name, (0,) * len(t.spec.shape), t.spec.shape) for t in growth.tensors}
    target = smaller_model(growth.target, Smaller(24))
    kept = choose(growth.target, target, measure(growth.target, SEQ, read, TOKENS, None), "importance", 0)
    back = plan_shrink(growth.target, SEQ, target, kept)
    first, again = (
        run_model(m, SEQ, r, torch.float64, TOKENS) for m, r in ((model, reader(state)), (back.target, grown_reader(back, grown_state)))
    )
    for a, b in zip((first.logits, *first.ahead), (again.logits, *again.ahead), strict=True):
        assert (a - b).abs().max() < 1e-12 * max(1.0, a.std().item())


QWEN = MODELS["qwen3-next"]
INNER: dict[str, tuple[dict[str, Any], Sizes]] = {
    "latents": (LATENT, Sizes(kv_rank=12, query_rank=15)),
    "latents, values": (LATENT, Sizes(kv_rank=11, value_dim=8, num_heads=6)),
    "no query rank": ({**LATENT, "latent": {"kv_rank": 8, "rope_dim": 4}, "rope_interleaved": False, "norm_eps": 0.1}, Sizes(kv_rank=20)),
    "DyT": ({**LATENT, "norm": "dyt"}, Sizes(kv_rank=12, query_rank=15)),
    "modules": (MODELS["deepseek"], Sizes(kv_rank=12, value_dim=6)),
    "delta": (QWEN, Sizes(key_dim=10, value_dim=9)),
    "delta heads": (QWEN, Sizes(key_heads=4, value_heads=8, conv_size=6)),
    "delta, all": (QWEN, Sizes(36, key_heads=4, value_heads=8, key_dim=12, value_dim=7, conv_size=5)),
}


@pytest.mark.parametrize("name", INNER)
def test_what_grew_inside_an_attention_comes_off_again(name: str) -> None:
    """Catches a latent whose norm divides by channels that are gone, taps of other tokens, value heads of other key heads, and an epsilon
    or a gain that is not undone.
    """
    changes, sizes = INNER[name]
    model = toy(**changes)
    state = random_state(model)
    growth = plan_growth(model, SEQ, sizes, GrowthOptions(width="zero", heads="zero"))
    read = grown_reader(growth, state)
    grown_state = {t.name: read(t.name, (0,) * len(t.spec.shape), t.spec.shape) for t in growth.tensors}
    inner = next(sized for own in model.variants.values() if (sized := inner_sizes(own)))
    wanted = {key: size for key, size in inner.items() if getattr(sizes, key) is not None}
    whole = Smaller(model.hidden_size, model.num_heads if sizes.num_heads else None, inner=wanted)
    target = smaller_model(growth.target, whole)
    back = plan_shrink(growth.target, SEQ, target, choose(growth.target, target, measure(growth.target, SEQ, read, TOKENS, None),
                                                          "importance", 0))  # fmt: skip
    assert [inner_sizes(own) for own in back.target.variants.values()] == [inner_sizes(own) for own in model.variants.values()]
    first, again = (
        run_model(m, SEQ, r, torch.float64, TOKENS) for m, r in ((model, reader(state)), (back.target, grown_reader(back, grown_state)))
    )
    for a, b in zip((first.logits, *first.ahead), (again.logits, *again.ahead), strict=True):
        assert (a - b).abs().max() < 1e-12 * max(1.0, a.std().item())


def silenced(state: dict[str, torch.Tensor], name: str, rows: list[int], columns: bool = False) -> None:
    """Zeros in rows, or columns, of the weights of this name in all layers, and in their biases."""
    for key, tensor in state.items():
        if key.endswith((f"attention.{name}.weight", f"attention.{name}.bias")):
            if not columns:
                tensor[rows] = 0
            elif tensor.ndim == 2:
                tensor[:, rows] = 0


SILENT: dict[str, tuple[dict[str, Any], list[tuple[str, list[int], bool]], dict[str, int], dict[str, list[int]]]] = {
    "kv_rank": (LATENT, [("kv_down", [0, 3], False)], {"kv_rank": 6}, {"kv_rank": [1, 2, 4, 5, 6, 7]}),
    "query_rank": (LATENT, [("q_down", [2], False)], {"query_rank": 9}, {"query_rank": [0, 1, *range(3, 10)]}),
    "values": (LATENT, [("o", [1, 6, 11, 16], True)], {"value_dim": 4}, {"value_dim": [0, 2, 3, 4]}),
    "key_dim": (QWEN, [(n, [1, 5], False) for n in ("q", "k")], {"key_dim": 3}, {"key_dim": [0, 2, 3]}),
    "value heads": (QWEN, [("o", [*range(6), *range(18, 24)], True)], {"value_heads": 2}, {"value_heads": [1, 2], "key_heads": [0, 1]}),
    "key heads": (QWEN, [("o", list(range(12)), True)], {"key_heads": 1, "value_heads": 2}, {"value_heads": [2, 3], "key_heads": [1]}),
}


@pytest.mark.parametrize("name", SILENT)
def test_what_says_nothing_goes_first(name: str) -> None:
    """Catches importance that looks at the wrong heads or channels: silent ones go, wherever they are, and the function stays."""
    changes, silent, sizes, stay = SILENT[name]
    model = toy(**changes)
    state = {key: tensor.clone() for key, tensor in random_state(model).items()}
    for weight, rows, columns in silent:
        silenced(state, weight, rows, columns)
    target = smaller_model(model, Smaller(inner=sizes))
    kept = choose(model, target, measure(model, SEQ, reader(state), TOKENS, None), "importance", 0)
    inside = next(found for found in kept.inner if found)
    assert {key: inside[key] for key in stay} == stay
    plan = plan_shrink(model, SEQ, target, kept)
    first = run_model(model, SEQ, reader(state), torch.float64, TOKENS).logits
    again = run_model(plan.target, SEQ, grown_reader(plan, state), torch.float64, TOKENS).logits
    assert (first - again).abs().max() < 1e-12 * max(1.0, first.std().item())


@pytest.mark.parametrize(
    ("changes", "sizes", "words"),
    [
        (LATENT, {"kv_rank": 9}, "--kv-rank is 9 but the source has 8: shrinking does not grow"),
        (LATENT, {"rope_dim": 2}, "channels that hold positions stay as they are"),
        (LATENT, {"key_dim": 2}, "no attention of this model has it"),
        ({}, {"kv_rank": 2}, "--kv-rank is 2, but no attention of this model has it"),
        (QWEN, {"value_heads": 3}, "value heads over"),
    ],
)
def test_inner_sizes_that_are_refused(changes: dict[str, Any], sizes: dict[str, int], words: str) -> None:
    """Catches a size that is left out without a word."""
    with pytest.raises(UsageError, match=words):
        smaller_model(toy(**changes), Smaller(inner=sizes))


PATTERN = {
    "kinds": {"a": {"ffn_size": 16}, "b": {"num_heads": 8, "num_kv_heads": 4, "head_dim": 4}},
    "pattern_first": ["b"],
    "pattern": ["a", "b"],
    "num_layers": 7,
}


def test_layers_go_in_whole_patterns() -> None:
    """Catches a layer that is left where another kind belongs, a first or last block that goes, and a cheaper choice that is missed."""
    model = toy(**PATTERN)
    losses = [math.inf, 5.0, 1.0, 2.0, 4.0, math.inf, math.inf]
    assert (removable(model), turn_of(model)) == (range(1, 5), 2)
    assert cheapest_layers(model, 5, losses) == [0, 1, 4, 5, 6]
    assert cheapest_layers(model, 3, losses) == [0, 1, 6]  # 2 and 3, 4 and 5
    plain = toy(num_layers=7)
    assert cheapest_layers(plain, 4, [math.inf, 5.0, 1.0, 2.0, 4.0, 3.0, math.inf]) == [0, 1, 4, 6]
    read, target = reader(random_state(model)), smaller_model(model, Smaller(num_layers=5, hidden_size=20))
    kept = choose(model, target, measure(model, SEQ, read, TOKENS, (removable(model), 2)), "importance", 0)
    plan = plan_shrink(model, SEQ, target, kept)
    assert [plan.target.kind_at(i) for i in range(5)] == [model.kind_at(i) for i in kept.layers] and len(kept.layers) == 5
    assert run_model(plan.target, SEQ, grown_reader(plan, random_state(model)), torch.float64, TOKENS).logits.isfinite().all()
    with pytest.raises(UsageError, match="in patterns of 2 layers that go together: take off a multiple of 2, or name layers with"):
        cheapest_layers(model, 4, losses)
    with pytest.raises(UsageError, match="the first and the last block stay, choose at least 3"):
        cheapest_layers(model, 1, losses)


def test_named_layers_go() -> None:
    """Catches a layer's weights under another's number, sizes of one kind taken for another's, and a pattern of layers that are gone."""
    model = toy(**PATTERN)
    target = smaller_model(model, Smaller(drop=(1, 2, 4), kinds=kinds_of(["kinds.b.num_heads=4"])))
    assert [target.kind_at(i) for i in range(4)] == ["b", "a", "a", "b"] and target.num_layers == 4
    assert {name: (m.num_heads, m.num_kv_heads) for name, m in target.variants.items()} == {"a": (4, 2), "b": (4, 4)}
    plan = plan_shrink(model, SEQ, target, choose(model, target, measure(model, SEQ, reader(random_state(model)), TOKENS, None),
                                                  "importance", 0, (1, 2, 4)))  # fmt: skip
    assert {t.source for t in plan.tensors if t.name.startswith("blocks.2.")} == {
        t.name.replace("blocks.2.", "blocks.5.") for t in plan.tensors if t.name.startswith("blocks.2.")
    }
    for drop, words in (((7,), "names layer 7, but the source has layers 0 to 6"), (tuple(range(7)), "names all layers")):
        with pytest.raises(UsageError, match=words):
            smaller_model(model, Smaller(drop=drop))
    with pytest.raises(UsageError, match="end with a layer of the same kind"):
        plan_shrink(ahead := toy(**PATTERN, mtp_depth=1), SEQ, short := smaller_model(ahead, Smaller(drop=(6,))),
                    choose(ahead, short, None, "importance", 0, (6,)))  # fmt: skip


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
