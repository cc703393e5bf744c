"""Norms, feed-forwards and positions that a package beside ours would bring: one row each, and no other file is touched."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.growth.exactness import MOE, SEQ, measure, random_state, toy
from megascale.config.activations import ACTIVATIONS, ActivationRow
from megascale.config.attentions import ATTENTIONS, GROUPED, AttentionGrowth
from megascale.config.identity import check_identity, identity
from megascale.config.load import build_config
from megascale.config.norms import NORMS, NormGrowth, NormRow
from megascale.config.positions import POSITIONS, PositionRow
from megascale.config.residuals import RESIDUALS, ResidualScheme
from megascale.config.routers import ROUTERS, RouterGrowth, RouterRow
from megascale.config.schema import Model, Parallel
from megascale.config.stages import estimated_costs
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.expand.options import GrowthOptions, Sizes, check_options
from megascale.expand.plan import plan_growth
from megascale.expand.smaller import Smaller, smaller_model
from megascale.formats.hf.config import hf_config
from megascale.formats.megatron.tensor_names import Cut, check_model
from megascale.measure.compute import flops_per_token
from megascale.model.attention import Attention
from megascale.model.ops.norm_kernels import choose_kernels
from megascale.model.residual import InitStd, Residual, Stack
from megascale.model.router import Choice, Scored
from megascale.model.spec import ParamSpec, declare
from tests.layouts import Case, tiny, train, worst
from tests.ranks import run_ranks

# Divides by the mean size of the channels, has a bias and grows by its own power; φ is a square; tokens do not know where they stand.
L1NORM = NormRow(lambda x, mean, eps: x / (mean(x.abs()) + eps), growth=NormGrowth(1.0))
SQUARE = ActivationRow(lambda x: x.relu().square(), False, 1.5, 2.0, grows=True)
NOPE = PositionRow(grid=True, grows=True)
# Gates are softplus of their own logits, divided by their sum.
SOFTPLUS = RouterRow("tests.test_rows:softplus_gates", growth=RouterGrowth(normed=True, alone=math.log(2)))
OURS = {"norm": "l1norm", "ffn": "relu2", "position": "nope", "bias": True}


# The sum of stream and branch keeps the size of one; nothing is said of grids, Megatron or any key.
HALVES = ResidualScheme("before", "tests.test_rows:halves")
UNIT = ResidualScheme("within", "tests.test_rows:halves", inner_norms=True, unit_scaled=True, reads=("mus_tau",))


def halves(cfg: Model, stack: Stack, layer: int) -> Residual:
    return Residual(cfg.residual_row, InitStd("xavier"), skip=math.sqrt(0.5), branch=math.sqrt(0.5))


def softplus_gates(logits: Tensor) -> Scored:
    scores = F.softplus(logits)

    def choice(experts: Tensor) -> Choice:
        own = scores.gather(-1, experts)
        gates = own / own.sum(-1, keepdim=True) if experts.shape[-1] > 1 else own
        return Choice(experts, gates, torch.softmax(logits, -1))

    return Scored(scores, choice)


def _undivided(logits: Tensor) -> Scored:
    scores = F.softplus(logits)
    return Scored(scores, lambda experts: Choice(experts, scores.gather(-1, experts), torch.softmax(logits, -1)))


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NORMS, "l1norm", L1NORM)
    monkeypatch.setitem(ACTIVATIONS, "relu2", SQUARE)
    monkeypatch.setitem(POSITIONS, "nope", NOPE)
    monkeypatch.setitem(ROUTERS, "softplus", SOFTPLUS)
    monkeypatch.setitem(RESIDUALS, "halves", HALVES)
    monkeypatch.setitem(RESIDUALS, "unit", UNIT)


@pytest.mark.dist
@pytest.mark.parametrize("residual", ["pre", "subln", "halves", "unit"])
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
        ({"residual": "halves"}, Sizes(num_layers=4, hidden_size=48)),
        ({"residual": "unit", "init_std": 0.02}, Sizes(num_layers=3, hidden_size=48, ffn_size=64)),
        ({"moe": MOE, "bias": False}, Sizes(experts=8)),
    ],
    ids=["width and depth", "heads", "channels", "behind the sum", "inner norms", "a scheme", "unit scaling", "experts"],
)
def test_new_rows_grow_as_they_say(changes: dict[str, Any], sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gains and epsilons of a root mean square under a norm that takes another mean."""
    if not changes.get("bias", True):
        monkeypatch.setitem(NORMS, "l1norm", replace(L1NORM, bias=False))
    growth = plan_growth(toy(**{**OURS, **changes}), SEQ, sizes, GrowthOptions())
    assert measure(growth, random_state(growth.source))["logits_max"] < 1e-10


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, Sizes(experts=4)),
        ({}, Sizes(experts=4, top_k=1)),
        ({}, Sizes(experts=4, granularity=2)),
        ({"moe": {**MOE, "router": "softplus"}}, Sizes(experts=8)),
        ({"moe": {**MOE, "router": "softplus"}}, Sizes(experts=8, granularity=2)),
        ({"moe": {**MOE, "router": "softplus"}, "norm": "rmsnorm"}, Sizes(hidden_size=48)),
    ],
    ids=["from dense", "one gate", "finer from dense", "more", "more and finer", "width"],
)
@pytest.mark.parametrize("normed", [True, False])
def test_a_new_router_grows_as_its_row_says(changes: dict[str, Any], sizes: Sizes, normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gates whose sum is made up for as if they were a softmax's."""
    if not normed:
        row = RouterRow(_undivided, growth=RouterGrowth(normed=False, alone=math.log(2)))
        monkeypatch.setitem(ROUTERS, "softplus", row)
    model = toy(**changes)
    if not normed and model.moe is None and sizes.granularity > 1:
        with pytest.raises(UsageError, match="equal gates do not choose all parts"):
            plan_growth(model, SEQ, sizes, GrowthOptions(router="softplus"))
        return
    growth = plan_growth(model, SEQ, sizes, GrowthOptions(router="softplus"))
    assert measure(growth, random_state(growth.source))["logits_max"] < 1e-10
    monkeypatch.setitem(ROUTERS, "softplus", replace(SOFTPLUS, growth=None))
    if sizes.experts is None:
        plan_growth(model, SEQ, sizes, GrowthOptions())
        return
    with pytest.raises(UsageError, match=r"model.moe.router is softplus, whose row does not say how it grows"):
        plan_growth(model, SEQ, sizes, GrowthOptions(router="softplus"))


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
    with pytest.raises(UsageError, match=r"model.residual is 'halves', but megatron-core's GPT model needs pre"):
        check_model(built(residual="halves"), Cut(1, 1, "te", 8))
    with pytest.raises(UsageError, match=r"model.moe.router is softplus, but megatron-core has the weights of topk_softmax"):
        check_model(built(moe={"router": "softplus"}), Cut(1, 1, "te", 8))
    with pytest.raises(ValueError, match="the gate of a zero logit is 0"):
        RouterGrowth(True, 0.0)
    with pytest.raises(UsageError, match=r"model.moe.router is 'softplush': .* did you mean softplus\?"):
        built(moe={"router": "softplush"})
    with pytest.raises(UsageError, match=r"--router is soft: choose one of topk_softmax, .*, softplus"):
        check_options(GrowthOptions(router="soft"))
    with pytest.raises(UsageError, match=r"run.kernels is te but te does not have model.norm l1norm"):
        choose_kernels("te", "l1norm", torch.device("cuda"))
    assert {"l1norm"} < set(Model.model_json_schema()["properties"]["norm"]["enum"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"residual": "unit", "optim": {"name": "normuon", "weight_decay": 0.0}}, "steps of this optimizer do not follow weights"),
        ({"residual": "unit", "optim": {"weight_decay": 0.1}}, "weight decay multiplied by the learning rate would change"),
        ({"residual": "unit", "moe": {}, "optim": {"weight_decay": 0.0}}, "experts have neither inner norms"),
        ({"residual": "halves", "mus_tau": 0.1}, "only unit-scaled blocks have a τ"),
        ({"residual": "halves", "branchnorm_period": 3}, "only residual branchnorm uses it"),
        ({"residual": "halves", "deepscale_unit": "gradient"}, "other schemes have no such choice"),
        ({"residual": "halves", "precision": {"fp8": "static"}}, "static FP8 scales need a unit-scaled model"),
        (
            {"residual": "halves", "family": "spacetime", "spacetime": {"shape": [4, 4], "patch": [2, 2], "channels": 1}},
            "blocks over grids",
        ),
        ({"residual": "halves", "moeut": {}, "moe": {}}, "MoEUT is a decoder with a fixed block"),
    ],
)
def test_rules_ask_a_scheme_for_facts(changes: dict[str, Any], words: str) -> None:
    """Catches a rule that knows schemes by name, and lets pass what a new one cannot be combined with."""
    sections = {k: changes[k] for k in ("optim", "precision") if k in changes}
    model = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 8, **{k: v for k, v in changes.items() if k not in sections}}
    seq_len = 4 if "spacetime" in model else 16
    with pytest.raises(UsageError, match=words):
        check(build_config({"model": model, "train": {"steps": 1, "seq_len": seq_len}, "data": {"train": "x"}, **sections}), 1)


class ScaledAttention(Attention):
    """With a learned factor on every channel of what the heads found."""

    def __init__(self, cfg: Model, row: Residual, dtype: torch.dtype, causal: bool) -> None:
        super().__init__(cfg, row, dtype, causal)
        self.factor = declare(ParamSpec((cfg.num_heads * cfg.head_dim,), "scale", 0, mean=1.0), dtype)

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return super().output(y * self.factor.to(y.dtype), x)


@pytest.mark.parametrize("sizes", [Sizes(hidden_size=48, ffn_size=64), Sizes(num_layers=4), Sizes(vocab_size=64)])
def test_an_attention_grows_as_its_row_says(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches growth that knows the weights of grouped attention alone, and one that goes by a guess where a row says nothing."""
    growth = AttentionGrowth({**GROUPED.growth.axes, "factor": ("value",)}, GROUPED.growth.writers)  # type: ignore[union-attr]
    monkeypatch.setitem(ATTENTIONS, "scaled", replace(GROUPED, build="tests.test_rows:ScaledAttention", growth=growth))
    model = toy(attention="scaled", num_kv_heads=4)
    found = plan_growth(model, SEQ, sizes, GrowthOptions())
    assert any(t.name == "blocks.0.attention.factor" for t in found.tensors)
    assert measure(found, random_state(found.source))["logits_max"] < 1e-10
    monkeypatch.setitem(ATTENTIONS, "scaled", replace(ATTENTIONS["scaled"], growth=None))
    for change in (lambda m: plan_growth(m, SEQ, sizes, GrowthOptions()), lambda m: smaller_model(m, Smaller(16))):
        with pytest.raises(UsageError, match=r"model.attention is scaled, whose row does not say how it grows"):
            change(model)


def test_an_attention_is_asked_for_its_costs_and_its_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches stages, FLOPs and formats that take every attention for grouped, and a checkpoint from before the key that is another run."""
    monkeypatch.setitem(ATTENTIONS, "dear", replace(GROUPED, weights=lambda m: 1000, pair_flops=lambda m: 10, megatron=False))
    grouped, dear = tiny(), tiny(attention="dear")
    costs = [estimated_costs(m, 12)[0] for m in (grouped, dear)]
    assert costs[1] - costs[0] == 2 * (1000 - 24 * 6 * 2 * 6) + 0.5 * (10 - 4 * 24) * 12
    flops = [flops_per_token(m, {}, 12) for m in (grouped, dear)]
    assert flops[1] == flops[0] * 10 / (4 * 24)
    with pytest.raises(UsageError, match=r"model.attention is 'dear', but megatron-core's GPT model needs grouped"):
        check_model(dear, Cut(1, 1, "te", 8))
    with pytest.raises(UsageError, match=r"model.attention is 'dear' \(it has 'grouped'\)"):
        hf_config(dear, 12)
    config = Case(grouped).config
    assert not check_identity(config, {k: v for k, v in identity(config).items() if k != "model.attention"}, "an older checkpoint")
    with pytest.raises(UsageError, match=r"model.attention: 'grouped' there, 'dear' now"):
        check_identity(Case(dear).config, {k: v for k, v in identity(config).items() if k != "model.attention"}, "an older checkpoint")
    with pytest.raises(UsageError, match=r"MoEUT has its own attention"):
        check(build_config({**config.plain(), "model": {**dear.model_dump(), "moeut": {}, "moe": {}, "num_kv_heads": 4}}), 1)
    grid = {"family": "spacetime", "spacetime": {"shape": [4, 4], "patch": [2, 2], "channels": 1}, "attention": "dear"}
    monkeypatch.setitem(ATTENTIONS, "dear", replace(GROUPED, grid=False))
    with pytest.raises(UsageError, match=r"blocks over grids support only"):
        check(build_config({**config.plain(), "model": {**grouped.model_dump(), **grid, "vocab_size": None}}), 1)


def test_nobody_asks_for_a_name() -> None:
    """Catches the next `if cfg.norm == …`: what it wants to know belongs into the row."""
    tables: dict[str, dict[str, Any]] = {"norm": NORMS, "ffn": ACTIVATIONS, "position": POSITIONS, "router": ROUTERS, "residual": RESIDUALS}
    tables["attention"] = ATTENTIONS
    asked = []
    for path in [*Path("megascale").rglob("*.py"), *Path("tools").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr in tables:
                words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                asked += [f"{path}:{node.lineno}"] if words & tables[node.left.attr].keys() else []
    assert not asked
