"""Layers of different kinds, latent attention, multi-token prediction and the parts of today's models grow exactly or are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.growth.exactness import (
    SEQ,
    Change,
    grown_reader,
    measure,
    random_state,
    reader,
    scale_of,
    toy,
    unweighted,
    with_axis,
    with_target,
)
from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.expand.kinds import pattern_of
from megascale.expand.options import GrowthOptions, Sizes, kinds_of
from megascale.expand.plan import Growth, plan_growth
from megascale.expand.verify import Passed, compare
from megascale.expand.verify import run as run_model

MOE = {"num_experts": 4, "top_k": 2, "ffn_size": 16}
LATENT: dict[str, Any] = {
    "attention": "latent",
    "num_kv_heads": 4,
    "latent": {"kv_rank": 8, "query_rank": 10, "rope_dim": 4, "value_dim": 5},
    "rope_interleaved": True,
    "attention_bias": True,
}
KINDS: dict[str, Any] = {
    "kinds": {
        "local": {"sliding_window": 5, "rope_theta": 100.0},
        "far": {"position": "none", "num_heads": 8, "num_kv_heads": 1, "head_dim": 4, "ffn_size": 16, "ffn": "gelu"},
        "sparse": {"moe": MOE, "attention_scale": 0.3},
    },
    "pattern_first": ["local"],
    "pattern": ["far", "sparse"],
    "num_layers": 5,
}
DEEPSEEK: dict[str, Any] = {
    **LATENT,
    "kinds": {"dense": {"moe": None, "ffn_size": 24}, "sparse": {}},
    "pattern_first": ["dense"],
    "pattern": ["sparse"],
    "num_layers": 3,
    "moe": {**MOE, "num_shared": 1, "router": "sigmoid", "balance": "bias"},
    "mtp_depth": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "kinds": {**KINDS, "mtp_depth": 1},
    "deepseek": DEEPSEEK,
    "gpt-oss": {
        "ffn": "swiglu_clamped",
        "attention_sink": "learned",
        "attention_softcap": 3.0,
        "logit_softcap": 5.0,
        "attention_bias": True,
        "kinds": {"sliding": {"sliding_window": 4}, "full": {}},
        "pattern": ["sliding", "full"],
        "moe": {**MOE, "router_bias": True, "expert_bias": True},
    },
    "routers": {
        "kinds": {
            "groups": {"moe": {**MOE, "groups": 2, "top_groups": 1, "router": "sigmoid", "balance": "bias", "routed_scale": 2.5}},
            "shared": {"moe": {**MOE, "num_shared": 1, "shared_gate": True, "router": "softmax_topk", "balance_over": "batch"}},
            "alone": {"moe": {**MOE, "router": "sigmoid", "renormalize": False}},
            "divided": {"moe": {**MOE, "router": "softmax_topk", "renormalize": True}},
        },
        "pattern": ["groups", "shared", "alone", "divided"],
        "num_layers": 4,
    },
    "qwen3-next": {
        "norm": "rmsnorm_1p",
        "norm_eps": 0.01,
        "kinds": {
            "linear": {
                "attention": "gated_delta",
                "delta": {"key_heads": 2, "value_heads": 4, "key_dim": 4, "value_dim": 6, "conv_size": 3},
            },
            "full": {"qk_norm": True, "rope_fraction": 0.5, "head_dim": 8, "attention_gate": "channel"},
        },
        "pattern": ["linear", "full"],
        "moe": {**MOE, "num_shared": 1, "shared_gate": True},
    },
    "latent": {**LATENT, "attention_gate": "head", "attention_sink": "learned", "norm": "layernorm", "bias": True},
    "latent without query rank": {
        **LATENT,
        "latent": {"kv_rank": 8, "rope_dim": 4},
        "rope_interleaved": False,
        "attention_scale": 0.3,
        "norm_eps": 0.1,
    },
    "mtp, tied": {"mtp_depth": 2, "tie_embeddings": True, "norm_eps": 0.05},
    "mtp, tied, DyT": {"mtp_depth": 1, "tie_embeddings": True, "norm": "dyt"},
    "mtp, LayerNorm": {"mtp_depth": 1, "norm": "layernorm", "bias": True, "tie_embeddings": True},
    "mtp, μS": {"mtp_depth": 1, "residual": "mus", "init_std": 0.02},
    "partly rotated": {"rope_fraction": 1 / 3, "head_dim": 12, "attention_bias": "qkv"},
    "partly rotated, interleaved": {"rope_fraction": 0.5, "head_dim": 8, "qk_norm": True, "rope_interleaved": True},
    "gemma": {"residual": "sandwich", "norm": "rmsnorm_1p", "qk_norm": True, "embedding_factor": 4.9, "attention_scale": 0.3},
    "gemma, LayerNorm": {"residual": "sandwich", "norm": "layernorm"},
    "post-norm, zero-centred": {"residual": "post", "norm": "rmsnorm_1p"},
}
SIZES: dict[str, Sizes] = {
    "width": Sizes(30),
    "width x 2": Sizes(48),
    "heads": Sizes(num_heads=8, num_kv_heads=4),
    "all heads": Sizes(num_heads=8),
    "head size": Sizes(head_dim=8),
    "head size x": Sizes(head_dim=24),
    "ffn": Sizes(ffn_size=40),
    "whole patterns": Sizes(num_layers=9),
    "experts": Sizes(experts=8),
    "finer experts": Sizes(granularity=2),
    "kv rank": Sizes(kv_rank=12),
    "kv rank x 2": Sizes(kv_rank=16),
    "query rank": Sizes(query_rank=13),
    "rope": Sizes(rope_dim=6),
    "rope x 2": Sizes(rope_dim=8),
    "values": Sizes(value_dim=9),
    "mtp": Sizes(mtp_depth=3),
    "delta heads": Sizes(value_heads=8),
    "delta key heads": Sizes(value_heads=8, key_heads=4),
    "delta key size": Sizes(key_dim=7),
    "delta value size": Sizes(value_dim=8),
    "delta value size x 2": Sizes(30, value_dim=12, value_heads=6, key_heads=3),
    "convolution": Sizes(conv_size=5),
    "latent at once": Sizes(30, 8, 8, 16, ffn_size=40, num_layers=7, kv_rank=11, query_rank=20, rope_dim=6, value_dim=7),
    "one kind": Sizes(kinds=kinds_of(["kinds.local.ffn_size=40", "kinds.far.num_heads=16", "kinds.far.head_dim=6"])),
    "layers of kinds": Sizes(kinds=kinds_of(["kinds.local.num_layers=3", "kinds.far.num_layers=3", "kinds.sparse.num_experts=8"])),
    "one kind becomes experts": Sizes(48, kinds=kinds_of(["kinds.local.num_experts=4", "kinds.far.num_experts=2"])),
    "experts of kinds": Sizes(kinds=kinds_of([f"kinds.{kind}.num_experts=8" for kind in ("groups", "shared", "alone", "divided")])),
    "finer experts of kinds": Sizes(kinds=kinds_of([f"kinds.{kind}.granularity=2" for kind in ("groups", "alone", "divided")])),
    "dense becomes experts": Sizes(kinds=kinds_of(["kinds.dense.num_experts=4", "kinds.dense.top_k=2"])),
}
TOKENS = torch.randint(0, 37, (3, SEQ), generator=torch.Generator().manual_seed(3))
WAYS = (GrowthOptions(), GrowthOptions("zero", "zero", "zero", "cancel", symmetry="snr:10"))


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["in turn", "every way"])
@pytest.mark.parametrize("model", MODELS)
def test_every_axis_is_exact_or_refused(model: str, every: bool) -> None:
    """Catches an axis whose map is that of another kind, a norm whose statistics move, a module of multi-token prediction that is left
    behind, and a combination of a method and an axis that is let through and is another function.
    """
    source = toy(**MODELS[model])
    state, grown = random_state(source), 0
    small = run_model(source, SEQ, reader(state), torch.float64, TOKENS)
    for name, sizes in SIZES.items():
        ways = WAYS if every else (WAYS[list(SIZES).index(name) % 2],)
        grown += sum(is_exact(source, small, state, sizes, options) for options in ways)
    assert grown >= (8 if source.kinds else 6)


def is_exact(source: Model, small: Passed, state: dict[str, Tensor], sizes: Sizes, options: GrowthOptions) -> bool:
    """Whether a growth is not refused; then it must be exact, for modules of multi-token prediction too, and its config one that loads."""
    try:
        growth = plan_growth(source, SEQ, sizes, options)
    except UsageError:
        return False
    found = compare(growth, small, run_model(growth.target, SEQ, grown_reader(growth, state), torch.float64, TOKENS), TOKENS)
    assert found["logits_max"] < 1e-12 * max(1.0, found["logits_std"]) and 0.01 < found["logits_std"] < 20, (sizes, options)
    assert len(found.get("mtp_max", ())) == source.mtp_depth
    assert Model.model_validate(growth.target.model_dump(by_alias=True)) == growth.target
    return True


def without_offset(growth: Growth) -> Growth:
    """Gains of 1 + weight scaled as if they were the weights."""
    return replace(growth, tensors=tuple(replace(t, offset=0.0) for t in growth.tensors))


def with_offset_of_delta(growth: Growth) -> Growth:
    """A norm over values that has gains of 1 + weight, as the model's have."""
    changed = (replace(t, offset=1.0, scale=1.5) if t.name.endswith("attention.norm.weight") else t for t in growth.tensors)
    return replace(growth, tensors=tuple(changed))


def reversed_taps(growth: Growth) -> Growth:
    taps = growth.axes["taps@linear"]
    return replace(growth, axes={**growth.axes, "taps@linear": replace(taps, source=np.roll(taps.source, -2))})


def of_another_kind(growth: Growth) -> Growth:
    """The query heads of one kind as those of another."""
    heads = growth.axes["query@far"]
    return replace(growth, axes={**growth.axes, "query@far": replace(heads, source=np.roll(heads.source, 4))})


WRONG: dict[str, tuple[str, Sizes, Change]] = {
    "rows of the latent as they are": ("latent without query rank", Sizes(kv_rank=12), with_axis("latent", unweighted)),
    "gains of the latent as they are": ("latent without query rank", Sizes(kv_rank=12), with_axis("latent_gain", unweighted)),
    "readers of the latent repeated": ("latent without query rank", Sizes(kv_rank=16), with_axis("latent_read", unweighted)),
    "delta: gains as they are": ("qwen3-next", Sizes(value_dim=8), with_axis("head_gain@linear", unweighted)),
    "delta: the epsilon of the larger key": ("qwen3-next", Sizes(key_dim=8), with_target(norm_eps_of={})),
    "delta: gains with the other norms' 1": ("qwen3-next", Sizes(30), with_offset_of_delta),
    "delta: a convolution that begins with the token": ("qwen3-next", Sizes(conv_size=5), reversed_taps),
    "sinks of other heads": ("gpt-oss", Sizes(num_heads=8), with_axis("sinks@full", lambda a: replace(a, source=np.roll(a.source, 1)))),
    "gates of other heads": ("latent", Sizes(num_heads=8), with_axis("gated", lambda a: replace(a, source=np.roll(a.source, 1)))),
    "readers of the query latent repeated": ("deepseek", Sizes(query_rank=20), with_axis("query_source@sparse", unweighted)),
    "scores of the smaller head": ("latent", Sizes(rope_dim=8), with_axis("query", unweighted)),
    "new pairs turn as the old ones": ("latent", Sizes(rope_dim=6), with_target(rope_exponents=None)),
    "the join repeated": ("mtp, tied", Sizes(48), with_axis("read_both", unweighted)),
    "hidden_norm by the final epsilon": ("mtp, tied", Sizes(48), with_target(norm_eps_of={})),
    "1/r not folded into the module's norm": ("mtp, tied", Sizes(48), scale_of("mtp.1.norm.weight", 1.0)),
    "gains without their 1": ("gemma", Sizes(30), without_offset),
    "another share rotates": ("partly rotated", Sizes(head_dim=14), with_target(rope_fraction=3 / 7)),
    "heads of another kind": ("kinds", Sizes(kinds=kinds_of(["kinds.far.num_heads=16"])), of_another_kind),
    "keys scaled in spite of attention_scale": (
        "gemma",
        Sizes(head_dim=12),
        with_axis("query_norm", lambda a: replace(a, weight=a.weight * 2**0.5)),
    ),
}


@pytest.mark.parametrize("rule", WRONG)
def test_the_proof_fails_without_a_rule(rule: str) -> None:
    """Catches a test above, and a proof, that would pass whatever the map is: one rule is taken out."""
    model, sizes, change = WRONG[rule]
    source = toy(**MODELS[model])
    growth, state = plan_growth(source, SEQ, sizes, GrowthOptions()), random_state(source)
    assert measure(growth, state)["logits_max"] < 1e-11
    assert measure(change(growth), state)["logits_max"] > 1e-4


@pytest.mark.parametrize("placement", ["spread", "end"])
@pytest.mark.parametrize("depth", ["identity", "cancel", "stack", "dus", "interleave", "inject"])
def test_depth_grows_by_whole_patterns(depth: str, placement: str) -> None:
    """Catches a method that puts a layer where another kind belongs, or that repeats the first or last layers with the pattern."""
    source = toy(**{**KINDS, "pattern_last": ["local"], "num_layers": 10})
    options = GrowthOptions(depth=depth, placement=placement, lossless="off")
    growth = plan_growth(source, SEQ, Sizes(num_layers=14), options)
    target = growth.target
    assert [target.kind_at(i) for i in range(14)] == [source.kind_at(layer.source) for layer in growth.layers]
    assert (target.pattern_first, target.pattern, target.pattern_last) == (source.pattern_first, source.pattern, source.pattern_last)
    assert growth.layers[0].source == 0 and growth.layers[-1].source == 9
    assert bool(growth.lossy) == (depth not in ("identity", "cancel"))
    if not growth.lossy:
        assert measure(growth, random_state(source))["logits_max"] < 1e-12


def test_layers_of_a_kind() -> None:
    """Catches inserted layers of another kind or at another place, and a pattern that does not describe them."""
    source = toy(**KINDS)  # local, far, sparse, far, sparse
    grown = plan_growth(source, SEQ, Sizes(kinds=kinds_of(["kinds.far.num_layers=4"])), GrowthOptions()).target
    assert (grown.pattern_first, grown.pattern, grown.pattern_last) == (("local",), ("far", "far", "sparse"), ())
    growth = plan_growth(source, SEQ, Sizes(kinds=kinds_of(["kinds.far.num_layers=4"])), GrowthOptions(placement="end"))
    assert [growth.target.kind_at(i) for i in range(7)] == ["local", "far", "sparse", "far", "far", "far", "sparse"]
    assert [layer.source for layer in growth.layers] == [0, 1, 2, 3, 3, 3, 4]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_pattern_of_any_layers(names: list[str]) -> None:
    """Catches a pattern that names other layers, and one that is longer than need be."""
    found = pattern_of(names)
    first, turn, last = found["pattern_first"], found["pattern"], found["pattern_last"]
    middle = len(names) - len(first) - len(last)
    assert [*first, *turn * (middle // len(turn)), *last] == names
    shortest = min(
        len(names) - size * (times - 1)
        for begin in range(len(names))
        for size in range(1, len(names) - begin + 1)
        for times in range(1, (len(names) - begin) // size + 1)
        if names[begin : begin + size] * times == names[begin : begin + size * times]
    )
    assert len(first) + len(turn) + len(last) == shortest


@pytest.mark.parametrize(
    ("model", "sizes", "options", "words"),
    [
        ("kinds", Sizes(num_layers=6), {}, "model.pattern has 2 layers: grow by a multiple of 2, or name a kind, kinds.NAME.num_layers"),
        ("kinds", Sizes(num_layers=9, kinds=kinds_of(["kinds.far.num_layers=4"])), {}, "give one of the two"),
        ("kinds", Sizes(kinds=kinds_of(["kinds.fat.ffn_size=40"])), {}, "its kinds are local, far, sparse; did you mean far?"),
        ("kinds", Sizes(kinds=kinds_of(["kinds.far.num_layers=1"])), {}, "has 2 layers of that kind: growth does not shrink"),
        ("kinds", Sizes(kinds=kinds_of(["kinds.far.num_layers=4"])), {"depth": "stack"}, "copies whole stacks, not layers of one kind"),
        ("kinds", Sizes(kinds=kinds_of(["kinds.far.kv_rank=16"])), {}, "kinds.far: --kv-rank is 16 but model.attention is grouped"),
        ("kinds", Sizes(kinds=kinds_of(["kinds.sparse.num_experts=6"])), {}, "kinds.sparse: --num-experts is 6 but the source has 4"),
        ("kinds", Sizes(kinds=kinds_of(["kinds.sparse.top_k=4"])), {}, "kinds.sparse: top_k 2 → 4 of 4 experts"),
        ("latent", Sizes(kv_rank=12), {}, "kv_rank 8 → 12 under layernorm: zeros among the latent's channels would move its mean"),
        ("latent", Sizes(rope_dim=5), {}, "choose an even number of at least 4"),
        ("latent", Sizes(kv_rank=4), {}, "--kv-rank is 4 but the source has 8: growth does not shrink"),
        ("latent without query rank", Sizes(query_rank=8), {}, "queries come from the stream itself"),
        ("mtp, LayerNorm", Sizes(30), {}, "with mtp_depth 1: its modules normalize what the last norm has multiplied by gains"),
        ("mtp, μS", Sizes(num_layers=4), {}, "model.mtp_depth is 1, and its blocks have the last layer's coefficients"),
        ("mtp, tied", Sizes(mtp_depth=4), {}, "looks at most 3 tokens further"),
        ("gemma", Sizes(num_layers=4), {"depth": "cancel"}, "with a norm at the branch's end"),
        ("gemma, LayerNorm", Sizes(30), {}, "choose a multiple of 24"),
    ],
)
def test_what_cannot_be_is_refused_by_name(model: str, sizes: Sizes, options: dict[str, Any], words: str) -> None:
    """Catches an axis that cannot be exact and is let through, and a refusal that does not name the kind, the value or the way out."""
    with pytest.raises(UsageError) as error:
        plan_growth(toy(**MODELS[model]), SEQ, sizes, GrowthOptions(**options))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("ffn_size=4", "write kinds.NAME.SIZE=N"),
        ("kinds.far.ffn_sizes=4", "is not a size of a kind; did you mean ffn_size?"),
        ("kinds.far.hidden_size=48", "is not a size of a kind"),
        ("kinds.far.ffn_size=-4", "is not understood"),
        ("kinds.far.ffn_size=0", "is not understood"),
    ],
)
def test_sizes_of_a_kind_are_checked(change: str, words: str) -> None:
    """Catches a misspelled size that grows nothing in silence."""
    with pytest.raises(UsageError) as error:
        kinds_of([change])
    assert words in str(error.value)


def test_a_size_reaches_the_kinds_that_have_none_of_their_own() -> None:
    """Catches a size of the model that overrules a kind's, or that a kind does not follow, and a flag that would do nothing."""
    growth = plan_growth(toy(**KINDS), SEQ, Sizes(ffn_size=40), GrowthOptions())
    assert {name: m.ffn_size for name, m in growth.target.variants.items()} == {"local": 40, "far": 16, "sparse": 40}
    assert any("kinds.far keeps its own ffn_size" in note for note in growth.notes)
    own = toy(kinds={"a": {"ffn_size": 8}, "b": {"ffn_size": 16}}, pattern=["a", "b"])
    with pytest.raises(UsageError, match="every kind of layer has its own: give kinds"):
        plan_growth(own, SEQ, Sizes(ffn_size=40), GrowthOptions())
    grown = plan_growth(toy(**DEEPSEEK), SEQ, Sizes(experts=8), GrowthOptions()).target
    assert grown.of_kind("dense").moe is None and grown.of_kind("sparse").moe == grown.moe
    assert grown.moe is not None and grown.moe.num_experts == 8 and grown.kinds["sparse"].model_fields_set == set()


def test_every_router_takes_more_experts() -> None:
    """Catches gates that are divided, biased, grouped or scaled as the router's row has it and not as the model does."""
    source = toy(**MODELS["routers"])
    growth = plan_growth(source, SEQ, SIZES["experts of kinds"], GrowthOptions(lossless="require"))
    assert measure(growth, random_state(source))["logits_max"] < 1e-12
    moe = growth.target.variants["groups"].moe
    assert moe is not None and (moe.groups, moe.top_groups, moe.top_k) == (4, 2, 4)
    biased = toy(**MODELS["gpt-oss"])
    with pytest.raises(UsageError, match="experts with biases are not cut into finer ones"):
        plan_growth(biased, SEQ, Sizes(granularity=2), GrowthOptions())


def test_new_modules_look_further_ahead() -> None:
    """Catches a module that is added in front of the others, and one that starts as zeros or as another's copy."""
    source = toy(mtp_depth=1)
    growth = plan_growth(source, SEQ, Sizes(mtp_depth=3), GrowthOptions())
    new = [t for t in growth.tensors if t.name.startswith(("mtp.1.", "mtp.2."))]
    assert new and all(t.source is None and t.constant is None and t.inserted for t in new)
    assert all(t.source == t.name for t in growth.tensors if t.name.startswith("mtp.0."))
    assert torch.equal(torch.tensor(measure(growth, random_state(source))["mtp_max"]), torch.zeros(1))
