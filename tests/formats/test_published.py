"""config.json files as published: every key passes, and the model has the published number of parameters."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megascale.config.load import load_config
from megascale.config.schema import Model
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.formats.hf.config import differences, hf_config, model_section
from megascale.formats.shapes import our_specs
from megascale.model.spec import ParamSpec, active_parameters

COMMON = {"use_cache": True, "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": False, "hidden_act": "silu"}
DEEPSEEK: dict[str, Any] = {
    **COMMON, "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "scoring_func": "sigmoid", "seq_aux": True, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    **COMMON, "architectures": ["GptOssForCausalLM"], "attention_bias": True, "eos_token_id": 200002, "experts_per_token": 4,
    "head_dim": 64, "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072, "model_type": "gpt_oss",
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
    "output_router_logits": False, "pad_token_id": 199999, "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9,
    "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"], "quant_method": "mxfp4"},
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
        "truncate": False,
    },
    "sliding_window": 128, "swiglu_limit": 7.0, "transformers_version": "4.55.0.dev0", "vocab_size": 201088,
}  # fmt: skip
QWEN3_NEXT: dict[str, Any] = {
    **COMMON, "architectures": ["Qwen3NextForCausalLM"], "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645,
    "full_attention_interval": 4, "head_dim": 256, "hidden_size": 2048, "intermediate_size": 5120, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
    "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_next", "moe_intermediate_size": 512,
    "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48,
    "num_key_value_heads": 2, "output_router_logits": False, "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000000, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
GLM_AIR: dict[str, Any] = {
    **COMMON, "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "pad_token_id": 151329, "eos_token_id": [151329, 151336],
    "head_dim": 128, "hidden_size": 4096, "partial_rotary_factor": 0.5, "intermediate_size": 10944, "max_position_embeddings": 131072,
    "model_type": "glm4_moe", "moe_intermediate_size": 1408, "norm_topk_prob": True, "num_attention_heads": 96, "n_group": 1,
    "topk_group": 1, "n_routed_experts": 128, "n_shared_experts": 1, "routed_scaling_factor": 1.0, "num_experts_per_tok": 8,
    "first_k_dense_replace": 1, "num_hidden_layers": 46, "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 1000000, "torch_dtype": "bfloat16", "transformers_version": "4.54.0", "use_qk_norm": False,
    "vocab_size": 151552,
}  # fmt: skip
GRANITE: dict[str, Any] = {
    **COMMON, "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
    "attention_multiplier": 0.0078125, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_size": 4096,
    "intermediate_size": 12800, "logits_scaling": 16.0, "max_position_embeddings": 4096, "mlp_bias": False, "model_type": "granite",
    "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0, "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0.dev0", "vocab_size": 49155,
}  # fmt: skip
PYTHIA: dict[str, Any] = {
    **COMMON, "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu", "hidden_size": 2048,
    "intermediate_size": 8192, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox",
    "num_attention_heads": 8, "num_hidden_layers": 16, "rotary_emb_base": 10000, "rotary_pct": 0.25, "torch_dtype": "float16",
    "transformers_version": "4.24.0", "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip


def counts(model: Model) -> tuple[int, int]:
    """Parameters of the model without modules of multi-token prediction, and those that one token uses, without the embedding's."""
    specs: dict[str, ParamSpec] = {
        n: s for n, s in our_specs(model, 8).items() if not n.startswith("mtp.") and not n.endswith("router.bias")
    }
    table = 0 if model.tie_embeddings else specs["embedding.weight"].numel
    return sum(s.numel for s in specs.values()), active_parameters(specs) - table


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (DEEPSEEK, 671.0, 37), (GPT_OSS, 20.9, 4), (QWEN3_NEXT, 79.7, 4), (GLM_AIR, 106.9, 13), (GRANITE, 8.2, 8), (PYTHIA, 1.0, 1),
    ],
    ids=lambda c: c["model_type"] if isinstance(c, dict) else "",
)  # fmt: skip
def test_published_configs(config: dict[str, Any], total: float, active: int) -> None:
    """Catches a key of millions of users that is refused, one that is read as another size, and an export that says another model. Totals
    in billions to a digit, as published.
    """
    model, _ = model_section(config, "config.json")
    found, used = counts(model)
    assert round(found / 1e9, 1) == total and round(used / 1e9) == active
    again = hf_config(model, config["max_position_embeddings"], config)
    assert differences(model, model_section(again, "the export")[0]) == {}
    json.dumps(again)


SHIPPED = {
    # ranks for the dry run, published parameters and active ones in billions; GPT-OSS counts one table, Qwen3-Next none
    "deepseek-v3": (2048, DEEPSEEK, 671.0, 36.6),
    "gpt-oss-20b": (64, GPT_OSS, 20.9, 3.6),
    "qwen3-next-80b": (256, QWEN3_NEXT, 79.7, 3.6),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_are_these_models(name: str) -> None:
    """Catches a shipped config that is another model than the published one, or that cannot run on the cluster that it names."""
    ranks, published, total, active = SHIPPED[name]
    config = check(load_config(f"configs/{name}.yaml"), ranks)
    found, used = counts(config.model)
    assert (round(found / 1e9, 1), round(used / 1e9, 1)) == (total, active)
    scaled = "rope_scaling" if name == "deepseek-v3" else ""  # stretched after pretraining
    want, _ = model_section({k: v for k, v in published.items() if k != scaled}, "config.json")
    assert differences(config.model, want) == {}


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        (DEEPSEEK, {"topk_method": "group_limited_greedy"}, "topk_method is 'group_limited_greedy'"),
        (DEEPSEEK, {"first_k_dense_replace": 61}, "first_k_dense_replace is 61, but it must be a number of layers below 61"),
        (DEEPSEEK, {"head_dim": 128}, "head_dim is 128, but it must be qk_rope_head_dim, which is 64"),
        (DEEPSEEK, {"rope_scaling": {**DEEPSEEK["rope_scaling"], "mscale": "x"}}, "rope_scaling.mscale is 'x', but it must be a number"),
        (DEEPSEEK, {"quantization_config": {"quant_method": "mxfp4"}}, "of deepseek_v3 only fp8 is undone"),
        (DEEPSEEK, {"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, "weight_block_size is '128'"),
        (GPT_OSS, {"swiglu_limit": 8.0}, "swiglu_limit is 8.0"),
        (GPT_OSS, {"experts_per_token": 2}, "experts_per_token is 2, but it must be num_experts_per_tok, which is 4"),
        (GPT_OSS, {"attention_bias": False}, "attention_bias is False"),
        (QWEN3_NEXT, {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
        (QWEN3_NEXT, {"shared_expert_intermediate_size": 700}, "must be a multiple of moe_intermediate_size, which is 512"),
        (QWEN3_NEXT, {"layer_types": ["sliding_attention"] * 48}, "it must be a list of full_attention and linear_attention"),
        (QWEN3_NEXT, {"sliding_window": 4096}, "sliding_window is 4096, which qwen3_next does not have"),
        (GLM_AIR, {"num_experts_per_tok": 1}, "its normalized gate is 1"),
        (GRANITE, {"residual_multiplier": "x"}, "residual_multiplier is 'x', but it must be a number"),
        (PYTHIA, {"use_parallel_residual": 3}, "use_parallel_residual is 3"),
        (PYTHIA, {"model_type": "gpt_neo"}, "the nearest is gpt_neox"),
        (DEEPSEEK, {"model_type": "deepseek_v4"}, "the nearest is deepseek_v3"),
    ],
)  # fmt: skip
def test_what_changes_logits_is_refused(config: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    """Catches a key of these families that is ignored though logits depend on it, and an unknown family that no name is offered for."""
    with pytest.raises(UsageError) as error:
        model_section({**config, **changes}, "config.json")
    assert words in str(error.value), str(error.value)


def test_the_hybrid_of_thirty_million() -> None:
    """Catches a shipped config that grows past what two cores train in minutes, or loses one of its parts."""
    config = check(load_config("configs/hybrid-30m.yaml", ["model.vocab_size=8192"]), 1)
    specs = our_specs(config.model, config.train.seq_len)
    assert 25e6 < sum(s.numel for n, s in specs.items() if not n.startswith("mtp.")) < 32e6 and config.model.mtp_depth == 1
    scans = [config.model.at_layer(i).attention_row.scans for i in range(config.model.num_layers)]
    assert scans == [True, True, True, False] * 2 and config.model.has_experts
