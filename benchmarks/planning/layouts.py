"""Small configs in many layouts, as plain data: what the planner's formulas are compared on. Name → ranks and config.

Those named small have a vocabulary so small that a layer's backward, and not the loss, needs most memory.
"""

from __future__ import annotations

from typing import Any

MODEL = {"num_layers": 8, "hidden_size": 512, "num_heads": 8, "num_kv_heads": 4, "ffn_size": 1536, "vocab_size": 32000}
TRAIN = {"steps": 1, "seq_len": 1024, "global_batch_size": 32, "micro_batch_size": 1}
Case = tuple[int, dict[str, Any]]


def case(
    ranks: int, parallel: dict[str, Any], model: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **more: Any
) -> Case:
    values = {"model": {**MODEL, **(model or {})}, "parallel": {"compile": False, **parallel}, "train": {**TRAIN, **(train or {})}}
    return ranks, {**values, "precision": {"compute": "bf16"}, "data": {"train": "none"}, **more}


SHARDED = {"dp_shard": 8}
TENSOR = {"tp": 2, "tp_sequence": True, "dp_shard": 4}
FULL: dict[str, Any] = {"recompute": "full"}
SELECTIVE: dict[str, Any] = {"recompute": "selective"}
FEW = {"global_batch_size": 4}
WIDE = {"micro_batch_size": 4}
LONG = {"seq_len": 4096}
SMALL = {"vocab_size": 2048}
MOE = {"num_experts": 8, "top_k": 2, "ffn_size": 768}
EXPERTS = {"dp_shard": 8, "ep": 4}
LATENT = {"attention": "latent", "num_kv_heads": 8, "latent": {"kv_rank": 128, "query_rank": 192, "rope_dim": 32}}
PAIR = {"family": "encoder_decoder", "encoder_layers": 8}
GPT = {"ffn": "gelu", "bias": True, "norm": "layernorm", "position": "learned", "num_kv_heads": 8, "tie_embeddings": True}
WINDOWS = {"kinds": {"local": {"sliding_window": 256}, "full": {}}, "pattern": ["local", "local", "local", "full"]}
FIRST_DENSE = {"kinds": {"dense": {"moe": None}, "sparse": {}}, "pattern": ["sparse"], "pattern_first": ["dense"], "moe": MOE}
UNIT = {"residual": "mus", "ffn": "gelu", "num_kv_heads": 8}

LAYOUTS: dict[str, Case] = {
    "one": case(1, {}, train=FEW),
    "one full": case(1, FULL, train=FEW),
    "one fp32": case(1, {}, train=FEW, precision={"compute": "fp32"}),
    "one micro-batch": case(1, {}, train={"global_batch_size": 1}),
    "fsdp": case(8, SHARDED),
    "fsdp selective": case(8, SHARDED | SELECTIVE),
    "fsdp full": case(8, SHARDED | FULL),
    "fsdp nested": case(8, SHARDED | {"recompute": "nested"}),
    "fsdp of 4": case(8, SHARDED, train=WIDE),
    "fsdp of 4 full": case(8, SHARDED | FULL, train=WIDE),
    "zero-2": case(8, SHARDED | {"reshard_after_forward": False}),
    "reshard to 4": case(8, SHARDED | {"reshard_after_forward": 4}),
    "hsdp": case(8, {"dp_replicate": 2, "dp_shard": 4}),
    "ddp": case(8, {"engine": "ddp"}),
    "tp": case(2, {"tp": 2}, train=FEW),
    "tp sequence": case(8, TENSOR),
    "tp sequence full": case(8, {"tp": 4, "tp_sequence": True, "dp_shard": 2} | FULL),
    "tp sequence selective": case(8, TENSOR | SELECTIVE),
    "ring": case(8, {"cp": 4, "dp_shard": 2}, train=LONG),
    "ulysses": case(8, {"cp": 4, "dp_shard": 2, "cp_method": "ulysses"}, train=LONG),
    "1f1b": case(4, {"pp": 4}),
    "1f1b fsdp": case(8, {"pp": 2, "dp_shard": 4}),
    "1f1b fsdp full": case(8, {"pp": 2, "dp_shard": 4} | FULL),
    "interleaved": case(4, {"pp": 4, "pp_schedule": "interleaved_1f1b", "pp_virtual": 2}),
    "interleaved fsdp": case(8, {"pp": 2, "dp_shard": 4, "pp_schedule": "interleaved_1f1b", "pp_virtual": 2}),
    "zbv": case(4, {"pp": 4, "pp_schedule": "zbv"}),
    "looped": case(4, {"pp": 2, "dp_shard": 2, "pp_schedule": "looped_bfs", "pp_virtual": 2}),
    "layered": case(8, SHARDED | {"accumulation": "layered"}),
    "layered full": case(8, SHARDED | FULL | {"accumulation": "layered"}),
    "experts": case(8, EXPERTS, {"moe": MOE}),
    "experts full": case(8, EXPERTS | FULL, {"moe": MOE}),
    "experts selective": case(8, EXPERTS | SELECTIVE, {"moe": MOE}),
    "experts sharded": case(8, SHARDED, {"moe": MOE}),
    "experts tp": case(8, TENSOR | {"ep": 4}, {"moe": MOE | {"num_shared": 1}}),
    "experts in every second layer": case(8, EXPERTS, {"moe": MOE | {"every": 2}}),
    "gelu with biases": case(8, SHARDED, GPT),
    "sandwich": case(8, SHARDED, {"residual": "sandwich", "qk_norm": True}),
    "post": case(8, SHARDED, {"residual": "post"}),
    "encoder": case(8, SHARDED, {"family": "encoder"}),
    "fp8": case(8, SHARDED, UNIT, precision={"compute": "bf16", "fp8": "static"}, optim={"independent_decay": True, "weight_decay": 1e-4}),
    "muon": case(8, SHARDED, optim={"name": "muon"}),
    "windows": case(8, SHARDED, WINDOWS),
    "first layer dense": case(8, SHARDED, FIRST_DENSE),
    "latent": case(8, SHARDED, LATENT),
    "latent tp": case(8, TENSOR, LATENT),
    "latent full": case(8, SHARDED | FULL, LATENT),
    "tokens ahead": case(8, SHARDED, {"mtp_depth": 1}),
    "encoder decoder": case(8, SHARDED, PAIR),
    "encoder decoder tp": case(8, TENSOR | FULL, PAIR),
    "encoder decoder 1f1b": case(8, {"dp_shard": 4, "pp": 2}, PAIR),
    "small one": case(1, {}, SMALL, FEW),
    "small one full": case(1, FULL, SMALL, FEW),
    "small fsdp": case(8, SHARDED, SMALL),
    "small fsdp selective": case(8, SHARDED | SELECTIVE, SMALL),
    "small fsdp full": case(8, SHARDED | FULL, SMALL),
    "small fsdp of 4 full": case(8, SHARDED | FULL, SMALL, WIDE),
    "small fsdp nested": case(8, SHARDED | {"recompute": "nested"}, SMALL | {"num_layers": 16}),
    "small zero-2 full": case(8, SHARDED | FULL | {"reshard_after_forward": False}, SMALL),
    "small tp full": case(8, TENSOR | FULL, SMALL),
    "small layered full": case(8, SHARDED | FULL | {"accumulation": "layered"}, SMALL),
    "small experts full": case(8, EXPERTS | FULL, SMALL | {"moe": MOE}),
    "small latent full": case(8, SHARDED | FULL, SMALL | LATENT),
    "small wide full": case(8, SHARDED | FULL, SMALL | {"hidden_size": 2048, "num_heads": 16, "ffn_size": 6144}),
}
