"""Every axis and family of growth is exact in fp64, and every rule is needed: without it the model is another one."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from benchmarks.growth.exactness import MOE, SEQ, Row, grown_reader, markdown, measure, random_state, reader, result, rows, toy
from megascale.config.schema import Config, Model
from megascale.config.schema.row_name import RowName
from megascale.config.support import refusals
from megascale.errors import UsageError
from megascale.expand.options import GrowthOptions, Sizes
from megascale.expand.plan import plan_growth
from megascale.expand.stack import specs

ROWS = rows()


@pytest.mark.parametrize("row", ROWS, ids=[f"{r.axis}, {r.family}" for r in ROWS])
def test_matrix(row: Row) -> None:
    """Catches a rule of growth that is wrong or missing, and a naive variant that does not show: then the row proves nothing."""
    found = result(row)
    assert 0.01 < found["std"] < 20
    if found["lossy"]:
        assert found["delta"] > 0.01
    else:
        assert found["delta"] < 1e-10 and abs(found["loss_change"]) < 1e-10
    for name, delta in found["wrong"].items():
        assert delta > 1e-3, name


def test_the_matrix_has_every_family_that_the_model_has() -> None:
    """Catches a residual scheme, norm or position that came without its row."""
    for key in ("residual", "norm", "position", "ffn", "family"):
        field = Model.model_fields[key]
        names = set(get_args(field.annotation)) | {name for m in field.metadata if isinstance(m, RowName) for name in m.table()}
        there = {getattr(r.model, key) for r in ROWS}
        # Models with these keep their sizes, as growth says; positions that are none are among the random models.
        missing = names - there - {"encoder_decoder", "spacetime", "relative", "none"}
        assert not missing, f"{key}: {missing}"
    assert "| axis |" in markdown([result(ROWS[0])])


def change(**values: list[Any]) -> dict[str, list[Any]]:
    return values


MODELS = change(
    norm=["rmsnorm", "layernorm", "dyt", "rmsnorm_1p"],
    residual=[
        "pre",
        "post",
        "deepnorm",
        "branchnorm",
        "deepscale",
        "deepscale_post",
        "subln",
        "layerscale",
        "parallel",
        "neox",
        "res_post",
        "sandwich",
        "mus",
    ],
    position=["rope", "alibi", "learned", "xpos", "none"],
    ffn=["swiglu", "gelu", "relu"],
    tie_embeddings=[False, True],
    qk_norm=[False, True, "width"],
    num_kv_heads=[1, 2, 4],
    moe=[None, None, MOE, {**MOE, "router": "sigma"}, {**MOE, "num_shared": 1, "balance": "bias", "router": "sigmoid"}],
    family=["decoder", "encoder"],
    bias=[False, True],
    attention_bias=["qkv", True],
    attention_scale=[0.3],
    rope_fraction=[2 / 3],
    rope_interleaved=[True],
    mtp_depth=[1, 2],
)
GROWN = change(
    hidden_size=[30, 36, 48, 52],
    num_heads=[6, 8],
    num_kv_heads=[2, 4, 8],
    head_dim=[8, 12],
    ffn_size=[40, 64],
    expert_ffn_size=[20, 32],
    num_layers=[3, 4],
    experts=[4, 8],
    granularity=[2],
    vocab_size=[50],
    seq_len=[32],
    mtp_depth=[2, 3],
)
WAYS = change(
    width=["duplicate", "zero", "average"],
    ffn=["duplicate", "zero"],
    heads=["duplicate", "zero"],
    depth=["identity", "cancel"],
    placement=["spread", "end"],
    symmetry=["project", "none", "snr:15"],
    split=[(1.0, 1.0), (3.0, 1.0)],
    router=["topk_softmax", "softmax_topk", "sigmoid", "sigma", "xmoe"],
)


@st.composite
def any_growth(draw: st.DrawFn) -> tuple[Model, Sizes, GrowthOptions]:
    """Any model that trains, any sizes, any way."""

    def some(values: dict[str, list[Any]], most: int, least: int = 0) -> dict[str, Any]:
        keys = draw(st.lists(st.sampled_from(sorted(values)), min_size=least, max_size=most, unique=True))
        return {k: draw(st.sampled_from(values[k])) for k in keys}

    changes = some(MODELS, 5)
    if changes.get("residual") == "branchnorm":
        changes["branchnorm_period"] = 5
    if changes.get("residual") == "mus":
        changes["init_std"] = 0.02
    return toy(**changes), Sizes(**some(GROWN, 4, 1)), GrowthOptions(**some(WAYS, 4))


@given(any_growth())
@hypothesis_settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_composition_is_exact_or_refused(drawn: tuple[Model, Sizes, GrowthOptions]) -> None:
    """Catches rules that hold alone and not together, and a combination that is let through and is another function."""
    model, sizes, options = drawn
    if refusals(config_of(model, SEQ), 1):
        return  # no such model trains
    try:
        growth = plan_growth(model, SEQ, sizes, options)
    except UsageError:
        return
    assert not refusals(config_of(growth.target, growth.seq_lens[1]), 1)
    state = random_state(model)
    found = measure(growth, state)
    assert found["logits_max"] < 1e-10 and found["first_diverging_layer"] is None
    read = grown_reader(growth, state)
    for name, spec in specs(growth.target, growth.seq_lens[1]).items():
        assert torch.isfinite(read(name, (0,) * len(spec.shape), spec.shape)).all(), name


def config_of(model: Model, seq_len: int) -> Config:
    decay = {"optim": {"weight_decay": 0.0}} if model.residual == "mus" else {}
    return Config.model_validate({"model": model, "train": {"steps": 1, "seq_len": seq_len}, "data": {"train": "x"}, **decay})


@pytest.mark.parametrize(
    ("changes", "sizes", "options", "words"),
    [
        ({"position": "relative"}, Sizes(hidden_size=30), GrowthOptions(), "model.position is relative"),
        ({}, Sizes(hidden_size=16), GrowthOptions(), "--hidden-size is 16 but the source has 24: growth does not shrink"),
        ({}, Sizes(num_layers=1), GrowthOptions(), "growth does not shrink"),
        ({"norm": "layernorm", "residual": "post"}, Sizes(hidden_size=30), GrowthOptions(), "choose a multiple of 24"),
        ({"norm": "layernorm"}, Sizes(hidden_size=30), GrowthOptions(width="zero"), "average and duplicate are exact"),
        ({"norm": "dyt", "residual": "post"}, Sizes(num_layers=3), GrowthOptions(), "tanh of tanh"),
        ({"qk_norm": True, "norm": "layernorm"}, Sizes(head_dim=8), GrowthOptions(), "choose a multiple of 6"),
        ({}, Sizes(num_heads=5), GrowthOptions(), "num_heads"),
        ({"num_heads": 8, "head_dim": 6}, Sizes(num_kv_heads=3, num_heads=9), GrowthOptions(), "choose num_heads of at least 12"),
        ({"moe": MOE}, Sizes(experts=6), GrowthOptions(), "give a multiple"),
        ({"moe": MOE}, Sizes(experts=8, top_k=2), GrowthOptions(), "top_k 4 is exact"),
        ({}, Sizes(experts=4, top_k=1), GrowthOptions(router="xmoe"), "directions have no zero"),
        ({"moe": {**MOE, "top_k": 1}}, Sizes(experts=8), GrowthOptions(), "its gate is not divided by a sum"),
        ({}, Sizes(granularity=2), GrowthOptions(), "are for experts: give --num-experts"),
        ({}, Sizes(experts=4, granularity=2), GrowthOptions(router="softmax_topk"), "topk_softmax does"),
        ({}, Sizes(vocab_size=50), GrowthOptions(enable_vocabulary=True), "new tokens enter the normalizer"),
        ({}, Sizes(num_layers=4), GrowthOptions(depth="stack", lossless="require"), "identity and cancel are exact"),
        ({}, Sizes(num_layers=5), GrowthOptions(depth="dus"), "must be even and at most 4"),
        ({"linear": "bitlinear"}, Sizes(hidden_size=48), GrowthOptions(), "--symmetry none"),
        ({"residual": "subln"}, Sizes(ffn_size=40), GrowthOptions(), "--ffn-method zero"),
        ({"moe": {**MOE, "every": 2}}, Sizes(num_layers=3), GrowthOptions(), "grow by a multiple of 2"),
        ({}, Sizes(hidden_size=48), GrowthOptions(symmetry="loud"), "--symmetry is loud"),
        ({}, Sizes(hidden_size=48), GrowthOptions(depth="up"), "--depth-method is up: choose one of"),
        ({}, Sizes(hidden_size=10**9), GrowthOptions(), "more than 4096 times as much is implausible"),
        ({}, Sizes(hidden_size=48), GrowthOptions(symmetry="snr:-400"), "at most 60 dB"),
        ({}, Sizes(hidden_size=48), GrowthOptions(split=(float("inf"), 1.0)), "--split is inf:1: both parts must be finite"),
        ({}, Sizes(hidden_size=48), GrowthOptions(split=(float("nan"), 1.0)), "--split is nan:1: both parts must be finite"),
        ({}, Sizes(vocab_size=20), GrowthOptions(), "the source has 37: growth does not shrink"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], sizes: Sizes, options: GrowthOptions, words: str) -> None:
    """Catches an impossible row that is let through, and a refusal that does not say what would be exact."""
    with pytest.raises(UsageError) as error:
        plan_growth(toy(**changes), SEQ, sizes, options)
    assert words in str(error.value)


@pytest.mark.parametrize("depth", ["identity", "cancel"])
@pytest.mark.parametrize("residual", ["mus", "deepnorm", "deepscale", "deepscale_post"])
def test_stored_coefficients_stay_as_they_are_stored(residual: str, depth: str) -> None:
    """Catches a kept layer's coefficient that comes from the config again: runs store it in fp32, which is 4e-8 beside it, and an epsilon
    of an inserted norm that counts on the one and meets the other.
    """
    model = toy(residual=residual, **({"init_std": 0.02} if residual == "mus" else {}))
    roles = {n: spec.role for n, spec in specs(model, SEQ).items()}
    state = {n: t.to(torch.float32).to(t.dtype) if roles[n] == "coefficient" else t for n, t in random_state(model).items()}
    assert any(role == "coefficient" for role in roles.values())
    way = "identity" if residual == "mus" else depth  # what cancels would be divided by its own size
    growth = plan_growth(model, SEQ, Sizes(hidden_size=36, num_layers=4), GrowthOptions(depth=way))
    assert measure(growth, state)["logits_max"] < 1e-12


def test_elements_do_not_depend_on_how_they_are_asked_for() -> None:
    """Catches noise, means and starts that differ with the cut into slabs."""
    model = toy(norm="layernorm", bias=True, moe=None)
    growth = plan_growth(
        model, SEQ, Sizes(54, 8, 4, 8, 40, num_layers=3, vocab_size=50), GrowthOptions(symmetry="snr:10", split=(2.0, 1.0))
    )
    state = random_state(model)
    read = grown_reader(growth, state)
    random = np.random.default_rng(0)
    for t in growth.tensors:
        whole = read(t.name, (0,) * len(t.spec.shape), t.spec.shape)
        for _ in range(3):
            offset = tuple(int(random.integers(0, n)) for n in t.spec.shape)
            shape = tuple(int(random.integers(1, n - o + 1)) for n, o in zip(t.spec.shape, offset))
            part = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape))]
            assert torch.equal(read(t.name, offset, shape), part), t.name


def test_what_is_copied_keeps_its_bits() -> None:
    """Catches a rounding on the way through fp64: a ×2 growth without noise is a copy, or a half."""
    growth = plan_growth(toy(), SEQ, Sizes(hidden_size=48), GrowthOptions(symmetry="none"))
    state = {n: t.to(torch.bfloat16) for n, t in random_state(toy()).items()}
    read = grown_reader(growth, state, torch.bfloat16)
    up, name = state["blocks.0.ffn.up.weight"], "blocks.0.ffn.up.weight"
    assert torch.equal(read(name, (0, 0), (32, 48)), torch.cat((up / 2, up / 2), 1))
    embedding = state["embedding.weight"]
    assert torch.equal(read("embedding.weight", (0, 0), (37, 48)), torch.cat((embedding, embedding), 1))


def test_grids_grow_too() -> None:
    """Catches a dimension of the spacetime family's own tensors that is mapped as another one."""
    from megascale.config.schema import Spacetime
    from megascale.expand.verify import run

    fields = Spacetime(shape=(4, 6), patch=(1, 2), channels=2, objective="next_step")
    for changes in ({}, {"position": "learned", "norm": "layernorm", "bias": True}):
        model = toy(family="spacetime", spacetime=fields, vocab_size=None, **changes)
        state = random_state(model, seq_len=fields.tokens)
        growth = plan_growth(model, fields.tokens, Sizes(36, 8, 4, ffn_size=40, num_layers=4), GrowthOptions())
        grid = torch.randn(2, 5, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        small = run(model, fields.tokens, reader(state), torch.float64, grid)
        grown = run(growth.target, fields.tokens, grown_reader(growth, state), torch.float64, grid)
        assert (small.logits - grown.logits).abs().max() < 1e-10
