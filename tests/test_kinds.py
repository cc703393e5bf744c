"""Layers of different kinds: what a kind sets applies to its layers alone, on every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from megascale.config.load import build_config
from megascale.config.schema import Optim, Parallel
from megascale.config.stages import has_experts, stage_parts
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.generation.run import Sampling, generate
from megascale.measure.compute import flops_per_token
from megascale.model.families import build_part
from megascale.model.shape import shape_of
from megascale.model.spec import specs_of
from tests.layouts import Case, build, fake_batch, tiny, train
from tests.test_layouts import assert_equal

KINDS: dict[str, dict[str, Any]] = {
    "local": {"sliding_window": 5, "rope_theta": 100.0, "residual": "parallel", "qk_norm": True},
    "far": {"position": "none", "num_heads": 8, "num_kv_heads": 1, "head_dim": 4, "ffn_size": 16, "ffn": "gelu", "dropout": 0.1},
    "sparse": {"moe": {"num_experts": 4, "top_k": 2, "ffn_size": 16}, "position": "alibi", "attention_scale": 0.3},
}
MIXED = tiny(num_layers=5, kinds=KINDS, pattern_first=["local"], pattern=["far", "sparse"])
DENSE = tiny(num_layers=4, kinds={n: KINDS[n] for n in ("local", "far")}, pattern=["local", "far"])
LAYOUTS: dict[str, tuple[int, Parallel]] = {
    "zero3 x layered": (2, Parallel(accumulation="layered")),
    "tp beyond kv heads": (2, Parallel(tp=2, tp_sequence=True)),
    "ring": (2, Parallel(cp=2)),
    "ulysses": (2, Parallel(cp=2, cp_method="ulysses")),
    "pp x recompute": (2, Parallel(pp=2, recompute="selective")),
    "zbv": (2, Parallel(pp=2, pp_schedule="zbv")),
    "ep": (2, Parallel(ep=2, recompute="full")),
}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kinds_on_every_axis(layout: str) -> None:
    """Catches a pass that asks the model where it must ask the layer: for heads, windows, rotary angles, experts or dropout."""
    ranks, parallel = LAYOUTS[layout]
    assert_equal(Case(MIXED, parallel, packed=True, steps=2), ranks)


def test_a_pattern_of_one_kind_is_no_pattern() -> None:
    """Catches a key of a kind that does not reach its layers: a kind that sets it equals a model that does, bit for bit."""
    for name, kind in KINDS.items():
        plain, one = tiny(**kind), tiny(kinds={name: kind}, pattern=[name])
        losses = [train(Case(m, steps=2, packed=True, keep_tensors=False))["loss"] for m in (plain, one)]
        assert losses[0] == losses[1], name


def test_each_layer_is_of_its_kind() -> None:
    """Catches contexts that are shared between kinds: the mixed model equals blocks of single-kind models in turn."""
    case = Case(MIXED, packed=True)
    model = build(case, 1).model
    model.train(False)
    batch = fake_batch(case, [0, 1])
    inputs = batch.tokens, None, batch.documents, batch.positions
    seen: list[Any] = []
    hooks = [b.register_forward_hook(lambda m, args, out: seen.append((args[0], out))) for _, b in model.units()]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    for layer, (entered, left) in enumerate(seen):
        alone = build(Case(MIXED.of_kind(MIXED.kind_at(layer)), packed=True), 1).model
        alone.train(False)
        if not has_experts(alone.cfg, layer):
            alone.cfg = alone.cfg.model_copy(update={"moe": None})
        alone.get_submodule(f"blocks.{layer}").load_state_dict(model.get_submodule(f"blocks.{layer}").state_dict())
        found: list[Any] = []
        hook = alone.get_submodule(f"blocks.{layer}").register_forward_pre_hook(lambda m, args, found=found: found.append(args[1]))
        alone(*inputs)
        hook.remove()
        assert torch.equal(alone.get_submodule(f"blocks.{layer}")(entered, found[0]), left), layer


def test_generation_from_kinds() -> None:
    """Catches a cache with the window or positions of another layer: cached tokens equal those of whole passes."""
    case = Case(MIXED.model_copy(update={"tie_embeddings": False}), seq_len=24)
    model = build(case, 1)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    (found,) = generate(model, [prompt], Sampling(most=8))
    model.train(False)
    for i, token in enumerate(found):
        logits = model.model(torch.tensor([[*prompt, *found[:i]]]))
        assert int(logits[0, -1, : MIXED.vocab_size].argmax()) == token


def test_costs_read_the_pattern() -> None:
    """Catches FLOPs, stages and bytes that count every layer as the first one."""
    stage = build_part(MIXED, shape_of(Case(MIXED).config))
    specs = specs_of(stage)
    apart = 0.0
    for layer in range(MIXED.num_layers):
        own = MIXED.at_layer(layer)
        weights = sum(s.numel * s.uses for n, s in specs.items() if n.startswith(f"blocks.{layer}."))
        window = min(own.sliding_window or 12, 12)
        met = 12.0 if window == 12 else window * (2 * 12 - window + 1) / 2 / 12
        apart += 6 * weights + 12 * own.num_heads * own.head_dim * met
    ends = 6 * sum(s.numel for n, s in specs.items() if n.startswith(("final_norm", "head")))
    assert flops_per_token(MIXED, specs, 12) == pytest.approx(apart + ends, rel=1e-12)
    heavy = tiny(num_layers=4, kinds={"a": {"ffn_size": 3200}, "b": {}}, pattern_first=["a"], pattern_last=["b"] * 3)
    assert [len(p.layers) for p in stage_parts(heavy, Parallel(pp=2), 12)] == [1, 3]


def test_configs_without_kinds_resolve_as_before() -> None:
    """Catches a key of kinds in the saved config of a model without them, and a kind that is saved with keys that it does not set."""
    plain = {"model": tiny().model_dump(mode="json"), "train": {"steps": 1}, "data": {"train": "x"}}
    assert not {"kinds", "pattern", "pattern_first", "pattern_last"} & plain["model"].keys()
    saved = build_config({**plain, "model": MIXED.model_dump(mode="json")}).plain()
    assert saved["model"]["kinds"]["far"].keys() == KINDS["far"].keys()
    assert build_config(saved).model == MIXED


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": ["far", "spars"]}, "did you mean sparse"),
        ({"pattern": ["far", "sparse", "local"]}, "whole patterns must fill the rest"),
        ({"pattern": ["far", "local"]}, "no layer is of that kind"),
        ({"kinds": {**KINDS, "far": {"num_head": 2}}}, "did you mean model.kinds.far.num_heads"),
        ({"kinds": {**KINDS, "far": {"rope_scaling": {"typ": "yarn"}}}}, "did you mean model.kinds.far.rope_scaling.type"),
        ({"kinds": {**KINDS, "far": {"delta": {"zzz": 2}}}}, "model.kinds.far.delta has key_heads, value_heads"),
        ({"kinds": {**KINDS, "far": {"num_heads": 5, "num_kv_heads": 2}}}, "kind far"),
        ({"kinds": {**KINDS, "far": {"position": "learned"}}}, "a table of positions belongs to the whole model"),
        ({"kinds": {**KINDS, "far": {"residual": "deepscale"}}}, "share one stream"),
        ({"kinds": {**KINDS, "far": {"moe": {"top_k": 9}}}}, "in layers of kind far"),
        ({"family": "encoder_decoder"}, "one stack"),
        ({"kinds": {"": {}}, "pattern_first": [], "pattern": [""]}, "kinds has the name ''"),
        (
            {"moe": {"every": 2}, "kinds": {"a": {}, "b": {"moe": None}}, "pattern_first": ["a"], "pattern": ["b"]},
            "no layer would have some",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    """Catches a pattern that is accepted and then means something else, and a message that does not name the kind."""
    values = {**MIXED.model_dump(mode="json"), **changes}
    with pytest.raises(UsageError, match=words):
        check(build_config({"model": values, "train": {"steps": 1, "seq_len": 8}, "data": {"train": "x"}}), 1)


KEYS = st.fixed_dictionaries(
    {},
    optional={
        "sliding_window": st.sampled_from([None, 3, 7]),
        "rope_theta": st.sampled_from([50.0, 1e4]),
        "position": st.sampled_from(["rope", "none", "alibi", "xpos"]),
        "num_kv_heads": st.sampled_from([1, 2, 4]),
        "ffn_size": st.sampled_from([16, 32]),
        "qk_norm": st.booleans(),
        "attention_sink": st.sampled_from([None, "learned", "zero"]),
        "attention_softcap": st.sampled_from([None, 0.5]),
        "attention_gate": st.sampled_from([None, "channel", "head"]),
        "moe": st.sampled_from(
            [
                None,
                {"num_experts": 4, "top_k": 2, "ffn_size": 8},
                {"num_experts": 4, "top_k": 1, "ffn_size": 8, "router": "sigmoid", "balance": "bias", "groups": 2, "top_groups": 1},
                {"num_experts": 4, "top_k": 2, "ffn_size": 8, "num_shared": 1, "shared_gate": True, "balance_over": "batch"},
            ]
        ),
    },
)
LATENT = st.fixed_dictionaries(
    {"attention": st.just("latent"), "num_kv_heads": st.just(4), "latent": st.just({"kv_rank": 8, "query_rank": 10, "rope_dim": 4})},
    optional={"attention_sink": st.just("learned"), "attention_gate": st.just("channel"), "ffn_size": st.just(16)},
)
DELTA = st.fixed_dictionaries(
    {
        "attention": st.just("gated_delta"),
        "delta": st.just({"key_heads": 2, "value_heads": 4, "key_dim": 4, "value_dim": 6, "conv_size": 3}),
    },
    optional={"ffn_size": st.just(16)},
)
PRODUCTS = [Parallel(tp=2, pp=2), Parallel(cp=2, tp=2), Parallel(ep=2, pp=2), Parallel(tp=2, tp_sequence=True, accumulation="layered")]


@pytest.mark.slow
@pytest.mark.dist
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.lists(st.one_of(KEYS, LATENT, DELTA), min_size=1, max_size=3), st.sampled_from(PRODUCTS), st.booleans(), st.integers(0, 2))
def test_random_patterns(kinds: list[dict[str, Any]], parallel: Parallel, packed: bool, ahead: int) -> None:
    """Catches what the fixed pattern does not contain."""
    names = [f"kind{i}" for i in range(len(kinds))]
    model = tiny(num_layers=2 * len(kinds), kinds=dict(zip(names, kinds)), pattern=names, mtp_depth=ahead)
    # AdamW's first step is nearly a sign: with the usual epsilon it makes of rounding in a gradient of 1e-12 a step of its whole size.
    case = Case(model, parallel, optim=Optim(lr=1e-3, eps=1e-3), packed=packed, steps=2)
    config = case.config
    try:
        check(config.model_copy(update={"train": config.train.model_copy(update={"source_len": None})}), 4)
    except UsageError:
        assume(False)
    assert_equal(case, 4)


AROUND: dict[str, Any] = {"residual": "sandwich", "norm": "rmsnorm_1p", "embedding_factor": 4.9, "tie_embeddings": True}
FEATURES = tiny(**AROUND, rope_fraction=0.67, attention_bias="qkv", qk_norm=True)


@pytest.mark.dist
@pytest.mark.parametrize("parallel", [Parallel(tp=2, tp_sequence=True, recompute="full"), Parallel(pp=2, accumulation="depth_first")])
def test_features_of_blocks(parallel: Parallel) -> None:
    """Catches norms on both sides of a branch, zero-centred gains, biases of queries, keys and values alone, partly rotated heads and
    scaled embeddings that a pass forgets.
    """
    assert_equal(Case(FEATURES, parallel, packed=True, steps=2), 2)
