"""The planner's units hold every weight of a model once, and their bytes on a rank are those of the program."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st

from megascale.config.layout import axis_sizes
from megascale.config.load import build_config
from megascale.config.schema import Config
from megascale.config.support import check, refusals
from megascale.errors import UsageError
from megascale.model.families import build_part
from megascale.model.shape import shape_of
from megascale.model.spec import active_parameters, specs_of
from megascale.planning.memory import stored_bytes
from megascale.planning.weights import units_of
from megascale.train.estimate.memory import largest_rank
from tests.test_golden import CASES

SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "head_dim": 8, "vocab_size": 77, "ffn_size": 64}
MIXTURES: list[Any] = [
    {"num_experts": 4, "top_k": 2, "ffn_size": 16, "every": 2},
    {"num_experts": 4, "ffn_size": 24, "num_shared": 1, "router": "xmoe", "balance": "bias"},
    {"num_experts": 4, "ffn_size": 24, "num_shared": 1, "shared_gate": True, "expert_bias": True, "router_bias": True},
]


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """A model section that most of the rules accept."""
    moe = draw(st.sampled_from([None, *MIXTURES]))
    schemes = ["pre", "post", "layerscale", "parallel", "deepnorm", "sandwich"] + ([] if moe else ["subln"])
    return SIZES | {
        "family": draw(st.sampled_from(["decoder", "encoder"])),
        "num_kv_heads": draw(st.sampled_from([1, 2, 4])),
        "ffn": draw(st.sampled_from(["swiglu", "gelu"])),
        "bias": moe is None and draw(st.booleans()),
        "attention_bias": draw(st.sampled_from([None, "qkv", True])),
        "norm": draw(st.sampled_from(["rmsnorm", "layernorm", "dyt"])),
        "residual": draw(st.sampled_from(schemes)),
        "position": draw(st.sampled_from(["rope", "learned", "relative"])),
        "tie_embeddings": draw(st.booleans()),
        "qk_norm": draw(st.sampled_from([False, True, "width"])),
        "attention_sink": draw(st.sampled_from([None, "learned", "zero"])),
        "attention_gate": draw(st.sampled_from([None, "head", "channel"])),
        "embedding_norm": draw(st.booleans()),
        "mlm_head": draw(st.booleans()),
        "moe": moe,
    }


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    engine = draw(st.sampled_from(["fsdp2", "fsdp2", "ddp"]))
    pp = draw(st.sampled_from([1, 1, 2])) if engine == "fsdp2" else 1
    return {
        "engine": engine,
        "tp": draw(st.sampled_from([1, 2, 4])),
        "tp_sequence": draw(st.booleans()),
        "cp": draw(st.sampled_from([1, 2])),
        "pp": pp,
        "pp_schedule": draw(st.sampled_from(["1f1b", "zbv", "looped_bfs"])),
        "dp_replicate": draw(st.sampled_from([1, 2])) if engine == "fsdp2" else 1,
        "accumulation": draw(st.sampled_from(["depth_first", "layered"])) if engine == "fsdp2" and pp == 1 else "depth_first",
    }


def config_of(model: dict[str, Any], parallel: dict[str, Any], optimizer: str, moments: str | None = None, compute: str = "fp32") -> Config:
    train = {"steps": 1, "seq_len": 32, "global_batch_size": 32}
    return build_config(
        {
            "model": model,
            "parallel": parallel,
            "optim": {"name": optimizer, "moments": moments},
            "precision": {"compute": compute},
            "train": train,
            "data": {"train": "x"},
        }
    )


FAMILIES: dict[str, dict[str, Any]] = {
    "kinds": {"kinds": {"near": {"sliding_window": 8}, "far": {"num_kv_heads": 1, "ffn_size": 96}}, "pattern": ["near", "far"]},
    "first dense": {"kinds": {"dense": {"moe": None}, "sparse": {}}, "pattern": ["sparse"], "pattern_first": ["dense"], "moe": MIXTURES[0]},
    "latent": {"attention": "latent", "num_kv_heads": 4, "latent": {"kv_rank": 16, "query_rank": 24, "rope_dim": 4}},
    "ahead": {"mtp_depth": 2},
    "ahead tied": {"mtp_depth": 1, "tie_embeddings": True},
    "pair": {"family": "encoder_decoder", "encoder_layers": 2},
    "pair apart": {
        "family": "encoder_decoder",
        "encoder_layers": 4,
        "share_embeddings": False,
        "source_vocab_size": 51,
        "position": "relative",
    },
    "repeated": {k: v for k, v in CASES["moeut"].model.model_dump(exclude_unset=True, by_alias=True).items() if k not in SIZES},
    "fields": {k: v for k, v in CASES["spacetime"].model.model_dump(exclude_unset=True, by_alias=True).items() if k != "num_layers"},
}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(models() | st.sampled_from(list(FAMILIES.values())))
def test_weights_are_those_of_the_model(model: dict[str, Any]) -> None:
    """Catches a weight that is counted in no unit, in two, or as often as its layers are passed."""
    config = config_of(SIZES | model, {}, "adamw")
    assume(not refusals(config, 1))
    specs = specs_of(build_part(config.model, shape_of(config)))
    units = units_of(config)
    assert sorted(w.shape for unit in units.stored for w in unit.weights) == sorted(spec.shape for spec in specs.values())
    assert units.parameters == sum(s.numel for s in specs.values()) and units.active == active_parameters(specs)
    assert len(units.layers) == config.model.total_layers


COMPUTE = st.sampled_from(["fp32", "bf16"])
MOMENTS = st.sampled_from([None, "bf16", "int8"])


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    models() | st.sampled_from(list(FAMILIES.values())),
    layouts(),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, 1]),
    st.sampled_from([1, 4, 8, 16]),
    MOMENTS,
    COMPUTE,
)
def test_stored_bytes_are_exact(
    model: dict[str, Any], layout: dict[str, Any], ep: int, etp: int | None, ranks: int, moments: str, compute: str
) -> None:
    """Catches a weight that the planner cuts differently, shards over other ranks, or pads as FSDP2 does not: weights, gradients,
    optimizer state and shadows of the fullest rank are those of the dry run, to the byte.
    """
    model = SIZES | model
    experts = {"ep": ep, "etp": etp} if model.get("moe") and layout["engine"] == "fsdp2" else {}
    config = config_of(model, layout | experts, "normuon" if model.get("bias") else "adamw", moments, compute)
    try:
        config = check(config, ranks)
    except UsageError:
        reject()
    assert stored_bytes(config, ranks) == largest_rank(config, axis_sizes(config.parallel, ranks))
