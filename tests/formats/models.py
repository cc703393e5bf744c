"""Random models of every family, made and saved by transformers itself, with sizes and features drawn by hypothesis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

LENGTH = 20  # tokens that logits are compared on
DECODERS = ("llama", "mistral", "qwen3", "olmo2", "mixtral", "qwen3_moe", "gpt2")
NEWER = ("qwen2", "olmo3", "gemma3_text", "phi3", "starcoder2", "granite", "gpt_neox", "gemma2", "bloom")
MIXTURES = ("glm4_moe", "deepseek_v3", "gpt_oss", "qwen3_next")
FAMILIES = (*DECODERS, "bert", "t5", *NEWER, *MIXTURES)


@st.composite
def config_values(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Keyword arguments of a config class of transformers."""
    group, kv = draw(st.sampled_from([(1, 4), (2, 2), (4, 1), (3, 1), (1, 1)]))
    heads = group * kv
    experts = family in ("mixtral", "qwen3_moe", *MIXTURES)
    head = draw(st.sampled_from([4, 8] if experts else [4, 8, 10]))
    multiple = 4 if experts else 1  # transformers' grouped products want rows of a multiple of 16 bytes
    own_head = family in ("llama", "mistral", "qwen3", "mixtral", "qwen3_moe", "t5", "gemma2", "gemma3_text", *MIXTURES) and draw(
        st.booleans()
    )
    hidden = heads * head if not own_head else 4 * draw(st.integers(2, 7)) * heads
    common = {
        "vocab_size": draw(st.integers(30, 70)),
        "tie_word_embeddings": draw(st.booleans()),
        "initializer_range": draw(st.sampled_from([0.02, 0.3])),
        "bos_token_id": None,
        "eos_token_id": 3,
        "pad_token_id": None,
    }
    layers = draw(st.integers(1, 3))
    if family == "gpt2":
        return {
            **common,
            "n_embd": hidden,
            "n_head": heads,
            "n_layer": layers,
            "n_positions": draw(st.integers(LENGTH, 40)),
            "n_inner": draw(st.sampled_from([None, 36])),
            "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "relu"])),
            "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
        }
    if family == "bloom":
        return {**common, "hidden_size": heads * head, "n_head": heads, "n_layer": layers, "layer_norm_epsilon": 1e-3}
    if family == "t5":
        tied = common.pop("tie_word_embeddings")
        return {
            **common,
            "d_model": 4 * draw(st.integers(2, 9)),
            "d_kv": head,
            "d_ff": draw(st.integers(5, 60)),
            "num_heads": heads,
            "num_layers": layers,
            "num_decoder_layers": draw(st.sampled_from([None, 1, 2])),
            "relative_attention_num_buckets": draw(st.sampled_from([4, 6, 32])),
            "relative_attention_max_distance": draw(st.sampled_from([17, 128])),
            "feed_forward_proj": draw(st.sampled_from(["relu", "gated-gelu", "gated-silu", "gelu_new"])),
            "layer_norm_epsilon": draw(st.sampled_from([1e-6, 1e-3])),
            "scale_decoder_outputs": draw(st.booleans()),
            "own_head": not tied,
            "initializer_factor": draw(st.sampled_from([0.2, 1.0])),
        }
    if family == "bert":
        return {
            **common,
            "hidden_size": heads * head,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "intermediate_size": draw(st.integers(5, 60)),
            "max_position_embeddings": draw(st.integers(LENGTH, 40)),
            "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu"])),
            "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-3])),
            "type_vocab_size": draw(st.integers(1, 3)),
        }
    values = {
        **common,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "num_hidden_layers": layers,
        "intermediate_size": multiple * draw(st.integers(5, 60 // multiple)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "max_position_embeddings": 64,
        "rope_parameters": draw(ropes()),
    }
    if family not in ("olmo2", "olmo3", "qwen2", "phi3", "starcoder2", "granite", "gpt_neox", "deepseek_v3"):
        values["head_dim"] = head
    if family in ("olmo3", "gemma2", "gemma3_text", "qwen2"):
        values |= draw(layer_types(family, layers + 1))
    if family == "olmo3" or family == "gemma3_text":
        sliding = {"rope_type": "default", "rope_theta": draw(st.sampled_from([10000.0, 700.0]))}
        values["rope_parameters"] = {"full_attention": values["rope_parameters"], "sliding_attention": sliding}
    if family == "gemma2":
        values |= {key: draw(st.sampled_from([None, 2.0, 30.0])) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    if family in ("gemma2", "gemma3_text"):
        values["query_pre_attn_scalar"] = draw(st.sampled_from([4, 7]))
    if family == "phi3":
        share = draw(st.sampled_from([1.0, 0.5])) if head == 8 else 1.0
        values |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": share}}
        values |= {"sliding_window": draw(st.sampled_from([None, 7]))}
    if family == "starcoder2":
        values |= {"norm_epsilon": values.pop("rms_norm_eps"), "sliding_window": draw(st.sampled_from([None, 7]))}
        values |= {"hidden_act": draw(st.sampled_from(["gelu", "gelu_pytorch_tanh"]))}
    if family == "granite":
        factors = ("embedding_multiplier", "logits_scaling", "attention_multiplier", "residual_multiplier")
        values |= {key: draw(st.sampled_from([1.0, 0.22, 12.0])) for key in factors if draw(st.booleans())}
    if family == "gpt_neox":
        values |= {"layer_norm_eps": values.pop("rms_norm_eps"), "use_parallel_residual": draw(st.booleans())}
        values |= {"hidden_act": draw(st.sampled_from(["gelu", "gelu_fast"])), "attention_bias": draw(st.booleans())}
        values["rope_parameters"] |= {"partial_rotary_factor": draw(st.sampled_from([0.5, 1.0] if head % 4 == 0 else [1.0]))}
        values.pop("num_key_value_heads")
    if family in MIXTURES:
        return values | draw(mixtures(family, values, layers + 1))
    if family in ("mistral", "mixtral"):
        values["sliding_window"] = draw(st.sampled_from([None, 7]))
    if family in ("qwen3", "qwen3_moe") and draw(st.booleans()):
        values |= {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}
    number = draw(st.integers(2, 5))
    if family == "mixtral":
        values |= {"num_local_experts": number, "num_experts_per_tok": draw(st.integers(2, number))}
    if family == "qwen3_moe":
        values |= {
            "num_experts": number,
            "num_experts_per_tok": (chosen := draw(st.integers(1, number))),
            "moe_intermediate_size": 4 * draw(st.integers(1, 5)),
            "norm_topk_prob": chosen > 1 and draw(st.booleans()),
            "decoder_sparse_step": draw(st.integers(1, layers)),
        }
    return values


@st.composite
def mixtures(draw: st.DrawFn, family: str, values: dict[str, Any], layers: int) -> dict[str, Any]:
    """What is drawn further for a mixture of today."""
    found: dict[str, Any] = {"num_hidden_layers": layers}
    if family == "gpt_oss":
        number = draw(st.integers(2, 5))
        found |= {"num_local_experts": number, "num_experts_per_tok": draw(st.integers(2, number)), "sliding_window": 6}
        found["rope_parameters"] = values["rope_parameters"] | (
            {"truncate": draw(st.booleans())} if values["rope_parameters"]["rope_type"] == "yarn" else {}
        )
        return found | (draw(layer_types(family, layers)) if draw(st.booleans()) else {})
    if family == "qwen3_next":
        number, keys = draw(st.integers(2, 5)), draw(st.integers(1, 2))
        found |= {"num_experts": number, "num_experts_per_tok": (chosen := draw(st.integers(1, number)))}
        found |= {"moe_intermediate_size": (width := 4 * draw(st.integers(1, 4))), "norm_topk_prob": chosen > 1 and draw(st.booleans())}
        found |= {"shared_expert_intermediate_size": width * draw(st.integers(1, 2)), "decoder_sparse_step": draw(st.integers(1, layers))}
        found |= {"linear_num_key_heads": keys, "linear_num_value_heads": keys * draw(st.integers(1, 3))}
        found |= {
            "linear_key_head_dim": 8,
            "linear_value_head_dim": draw(st.sampled_from([4, 8])),
            "linear_conv_kernel_dim": draw(st.integers(1, 4)),
        }
        found["rope_parameters"] = values["rope_parameters"] | {"partial_rotary_factor": draw(st.sampled_from([0.5, 1.0]))}
        kinds = draw(st.lists(st.sampled_from(["linear_attention", "full_attention"]), min_size=layers - 1, max_size=layers - 1))
        return found | {"layer_types": [*kinds, "full_attention"]}  # transformers counts a cache's tokens in full layers alone
    groups, of_group = draw(st.sampled_from([(1, 4), (2, 2), (4, 2)]))
    open_groups = draw(st.integers(1, groups))
    chosen = draw(st.integers(1, min(3, open_groups * of_group)))
    found |= {"n_routed_experts": groups * of_group, "n_group": groups, "topk_group": open_groups, "num_experts_per_tok": chosen}
    found |= {"moe_intermediate_size": 4 * draw(st.integers(1, 5)), "n_shared_experts": draw(st.integers(1, 2))}
    found |= {"first_k_dense_replace": draw(st.integers(0, layers - 1)), "norm_topk_prob": chosen > 1 and draw(st.booleans())}
    found |= {"routed_scaling_factor": draw(st.sampled_from([1.0, 2.5]))}
    if family == "glm4_moe":
        found |= {"use_qk_norm": draw(st.booleans()), "attention_bias": draw(st.booleans())}
        found["rope_parameters"] = values["rope_parameters"] | {"partial_rotary_factor": draw(st.sampled_from([0.5, 1.0]))}
        return found
    rope = values["rope_parameters"]
    if rope["rope_type"] == "yarn" and draw(st.booleans()):
        rope = rope | {"mscale": draw(st.sampled_from([1.0, 0.7])), "mscale_all_dim": draw(st.sampled_from([1.0, 0.5]))}
    sizes = {k: draw(st.sampled_from([4, 8, 12])) for k in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")}
    found |= {**sizes, "q_lora_rank": draw(st.sampled_from([None, 12])), "rope_interleave": draw(st.booleans()), "rope_parameters": rope}
    return found | {"head_dim": sizes["qk_rope_head_dim"], "num_key_value_heads": values["num_attention_heads"]}


@st.composite
def layer_types(draw: st.DrawFn, family: str, layers: int) -> dict[str, Any]:
    """Which layers attend to a window: listed, by the family's own rule, or none."""
    values: dict[str, Any] = {"num_hidden_layers": layers, "sliding_window": 6}
    if family == "qwen2":
        values |= {"use_sliding_window": draw(st.booleans()), "max_window_layers": draw(st.integers(0, layers))}
    elif draw(st.booleans()):
        values["layer_types"] = [draw(st.sampled_from(["full_attention", "sliding_attention"])) for _ in range(layers)]
    return values


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["default", "linear", "llama3", "yarn"]))
    values: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from([10000.0, 500.0]))}
    if kind != "default":
        values["factor"] = draw(st.sampled_from([2.0, 8.0]))
    if kind in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = draw(st.sampled_from([8, 16]))
    if kind == "llama3":
        values |= {"low_freq_factor": 1.0, "high_freq_factor": draw(st.sampled_from([2.0, 4.0]))}
    if kind == "yarn" and draw(st.booleans()):
        values["attention_factor"] = 1.1
    return values


def auto(family: str) -> Any:
    """The class of transformers that makes and loads a language model of the family."""
    import transformers

    names = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
    return getattr(transformers, names.get(family, "AutoModelForCausalLM"))


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a transformers model; an encoder–decoder reads the tokens as source and as target."""
    pair = {"decoder_input_ids": tokens} if model.config.model_type == "t5" else {}
    return model(tokens, **pair).logits  # type: ignore[no-any-return]


def save(family: str, values: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A randomly started model, norms and biases moved off their starts so that none can be swapped unseen; returns it."""
    from transformers import AutoConfig

    torch.manual_seed(1)
    own_head = values.get("own_head", False)
    foreign = {"own_head", "initializer_range"} if family == "t5" else set()
    config = AutoConfig.for_model(family, **{k: v for k, v in values.items() if k not in foreign})
    model = auto(family).from_config(config).to(dtype).eval()
    if own_head:  # transformers makes T5's head its embedding, and loads one that is not
        model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().flip(0).clone())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.3 * torch.randn_like(buffer))
    model.save_pretrained(folder, **options)
    return model


SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# A plain model of each family, for tests of everything but the family.
PLAIN: dict[str, dict[str, Any]] = {
    **{
        f: {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 3, "bos_token_id": None}
        for f in (*DECODERS[:6], *NEWER[:8], *MIXTURES)
    },
    "gpt2": {"vocab_size": 50, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "eos_token_id": 3, "bos_token_id": None},
}
PLAIN["bloom"] = {"vocab_size": 50, "hidden_size": 32, "n_head": 4, "n_layer": 2, "eos_token_id": 3, "bos_token_id": None}
PLAIN["gemma3_text"] |= {"head_dim": 8, "pad_token_id": None}
PLAIN["gemma2"] |= {"head_dim": 8, "pad_token_id": None}
PLAIN["phi3"] |= {"pad_token_id": None}
PLAIN["olmo3"] |= {"pad_token_id": None}
del PLAIN["gpt_neox"]["num_key_value_heads"]
PLAIN["bert"] = {**SIZES, "max_position_embeddings": 64}
PLAIN["t5"] = {
    "vocab_size": 50, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu",
    "own_head": True, "scale_decoder_outputs": False, "eos_token_id": 3,
}  # fmt: skip
PLAIN["mixtral"] |= {"num_local_experts": 3}
PLAIN["qwen3_moe"] |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
# The bias of a choice is a buffer that transformers starts at zero; `save` moves it.
CHOSEN = {
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
PLAIN["glm4_moe"] |= {**CHOSEN, "head_dim": 8}
PLAIN["deepseek_v3"] |= {**CHOSEN, "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 16, "qk_rope_head_dim": 4}
PLAIN["deepseek_v3"] |= {"qk_nope_head_dim": 8, "v_head_dim": 8}
PLAIN["qwen3_next"] |= {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "head_dim": 8,
}
PLAIN["qwen3_next"] |= {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4}
PLAIN["qwen3_next"] |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
PLAIN["gpt_oss"] |= {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6}
PLAIN["qwen3"] |= {"head_dim": 8}
