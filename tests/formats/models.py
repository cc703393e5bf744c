"""Random models of every family, made and saved by transformers itself, with sizes and features drawn by hypothesis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

LENGTH = 20  # tokens that logits are compared on
DECODERS = ("llama", "mistral", "qwen3", "olmo2", "mixtral", "qwen3_moe", "gpt2")
FAMILIES = (*DECODERS, "bert", "t5")


@st.composite
def config_values(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Keyword arguments of a config class of transformers."""
    group, kv = draw(st.sampled_from([(1, 4), (2, 2), (4, 1), (3, 1), (1, 1)]))
    heads = group * kv
    experts = family in ("mixtral", "qwen3_moe")
    head = draw(st.sampled_from([4, 8] if experts else [4, 8, 10]))
    multiple = 4 if experts else 1  # transformers' grouped products want rows of a multiple of 16 bytes
    own_head = family not in ("olmo2", "gpt2", "bert") and draw(st.booleans())
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
    if family != "olmo2":
        values["head_dim"] = head
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
    model.save_pretrained(folder, **options)
    return model


SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# A plain model of each family, for tests of everything but the family.
PLAIN: dict[str, dict[str, Any]] = {
    **{
        f: {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 3, "bos_token_id": None} for f in DECODERS[:6]
    },
    "gpt2": {"vocab_size": 50, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "eos_token_id": 3, "bos_token_id": None},
}
PLAIN["bert"] = {**SIZES, "max_position_embeddings": 64}
PLAIN["t5"] = {
    "vocab_size": 50, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu",
    "own_head": True, "scale_decoder_outputs": False, "eos_token_id": 3,
}  # fmt: skip
PLAIN["mixtral"] |= {"num_local_experts": 3}
PLAIN["qwen3_moe"] |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
PLAIN["qwen3"] |= {"head_dim": 8}
