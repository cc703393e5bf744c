"""Hugging Face's model families as data: our equivalents of their config keys, and the modules that hold our weights.

A key of a config.json is mapped (`keys`), must have one of a few values (`fixed`), or does not affect the forward pass (keys.py). Any other
key is refused by name: a model that is read half is another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megascale.config.activations import ACTIVATIONS


@dataclass(frozen=True)
class Key:
    """A key of theirs and ours (`moe.top_k` is inside model.moe). `default`: transformers' value if absent. `values`: theirs → ours.
    `also`: another name that some versions of transformers write.
    """

    theirs: str
    ours: str
    default: Any = None
    values: Mapping[Any, Any] | None = None
    also: str | None = None


@dataclass(frozen=True)
class ModuleMap:
    """Their module, below a layer, that holds one of ours; `{expert}` if each expert has its own.

    transposed  weights are [in, out]
    part        ours is the part-th of equal parts of theirs along the output
    untied      its second place in models with an untied head; if both are stored, this one counts
    gated       its place in models with a gated feed-forward
    """

    theirs: str
    transposed: bool = False
    part: int = 0
    untied: str | None = None
    gated: str | None = None


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    ours    our keys with fixed values for the family
    layer   the prefix of a layer's modules; `inner`: our names → modules in it; `outer`: modules outside layers
    encoder, encoder_inner  the same for the layers of its encoder
    theta   rope_theta if absent
    window  whether a `sliding_window` applies to every layer: always, never, or if use_sliding_window is set
    length    the key of the longest sequence, `default_length` if absent
    copies    modules that hold another copy of the embedding
    segments  the table of segment vectors: the first is added to every position; exports write zeros, since ours has none
    unused    prefixes of tensors that do not affect logits: they are skipped, with a note
    also      other architectures: with more than the language model, or under an old name
    """

    model_type: str
    architecture: str
    ours: Mapping[str, Any]
    keys: tuple[Key, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    layer: str
    inner: Mapping[str, ModuleMap]
    outer: Mapping[str, ModuleMap]
    prefix: str = "model."
    theta: float | None = 10000.0
    window: str = "never"
    default_window: int | None = None
    length: str = "max_position_embeddings"
    default_length: int | None = None
    copies: tuple[str, ...] = ()
    encoder: str = ""
    encoder_inner: Mapping[str, ModuleMap] = field(default_factory=dict)
    segments: str | None = None
    unused: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


def _places(**theirs: str) -> dict[str, ModuleMap]:
    return {ours.replace("__", "."): ModuleMap(name) for ours, name in theirs.items()}


def _attention(*norms: str) -> dict[str, ModuleMap]:
    found = {f"attention.{n}": ModuleMap(f"self_attn.{n}_proj") for n in "qkvo"}
    return {**found, **{f"attention.{n}": ModuleMap(f"self_attn.{n}") for n in norms}}


def _t5_ffn(layer: str) -> dict[str, ModuleMap]:
    dense = f"{layer}.DenseReluDense"
    up = ModuleMap(f"{dense}.wi", gated=f"{dense}.wi_1")
    return {
        "ffn_norm": ModuleMap(f"{layer}.layer_norm"),
        "ffn.up": up,
        "ffn.gate": ModuleMap(f"{dense}.wi_0"),
        "ffn.down": ModuleMap(f"{dense}.wo"),
    }


def _t5_attention(ours: str, theirs: str) -> dict[str, ModuleMap]:
    layer = theirs.rpartition(".")[0]
    return {f"{ours}_norm": ModuleMap(f"{layer}.layer_norm"), **{f"{ours}.{n}": ModuleMap(f"{theirs}.{n}") for n in "qkvo"}}


PRE = _places(attention_norm="input_layernorm", ffn_norm="post_attention_layernorm")
SWIGLU = _places(ffn__gate="mlp.gate_proj", ffn__up="mlp.up_proj", ffn__down="mlp.down_proj")
OUTER = _places(embedding="model.embed_tokens", final_norm="model.norm", head="lm_head")
LLAMA = {"ffn": "swiglu", "norm": "rmsnorm", "bias": False, "residual": "pre", "position": "rope", "qk_norm": False}
GPT = {"norm": "layernorm", "bias": True, "residual": "pre", "position": "learned", "qk_norm": False}
SIZES = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "hidden_size"),
    Key("num_hidden_layers", "num_layers"),
    Key("num_attention_heads", "num_heads"),
    Key("num_key_value_heads", "num_kv_heads"),
    Key("head_dim", "head_dim"),
    Key("intermediate_size", "ffn_size"),
    Key("initializer_range", "init_std", 0.02),
    Key("tie_word_embeddings", "tie_embeddings", False),
)
EPS6, EPS5 = Key("rms_norm_eps", "norm_eps", 1e-6), Key("rms_norm_eps", "norm_eps", 1e-5)
# Their names of activations → ours.
PLAIN_FFN = {theirs: ours for ours, row in ACTIVATIONS.items() for theirs in row.hf}
T5_FFN = {theirs: ours for ours, row in ACTIVATIONS.items() for theirs in (*row.hf, *row.hf_gated)}
ACT: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}
NO_BIAS: Mapping[str, tuple[Any, ...]] = {**ACT, "attention_bias": (False,)}

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        "LlamaForCausalLM",
        LLAMA,
        (*SIZES, EPS6),
        {**NO_BIAS, "mlp_bias": (False,)},
        "model.layers.",
        {**PRE, **_attention(), **SWIGLU},
        OUTER,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        LLAMA,
        (*SIZES, EPS6),
        ACT,
        "model.layers.",
        {**PRE, **_attention(), **SWIGLU},
        OUTER,
        window="always",
        default_window=4096,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        {**LLAMA, "qk_norm": True},
        (*SIZES, EPS6),
        NO_BIAS,
        "model.layers.",
        {**PRE, **_attention("q_norm", "k_norm"), **SWIGLU},
        OUTER,
        window="asked",
        default_window=4096,
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        {**LLAMA, "residual": "res_post", "qk_norm": "width"},
        (*SIZES, EPS5),
        NO_BIAS,
        "model.layers.",
        {
            **_places(attention_norm="post_attention_layernorm", ffn_norm="post_feedforward_layernorm"),
            **_attention("q_norm", "k_norm"),
            **SWIGLU,
        },
        OUTER,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        {**LLAMA, "moe.router": "topk_softmax", "moe.every": 1, "moe.num_shared": 0},
        (
            *SIZES,
            EPS5,
            Key("intermediate_size", "moe.ffn_size"),
            Key("num_local_experts", "moe.num_experts", 8),
            Key("num_experts_per_tok", "moe.top_k", 2),
        ),
        ACT,
        "model.layers.",
        {
            **PRE,
            **_attention(),
            **_places(
                ffn__router="block_sparse_moe.gate",
                ffn__experts__gate="block_sparse_moe.experts.{expert}.w1",
                ffn__experts__down="block_sparse_moe.experts.{expert}.w2",
                ffn__experts__up="block_sparse_moe.experts.{expert}.w3",
            ),
        },
        OUTER,
        theta=1000000.0,
        window="always",
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**LLAMA, "qk_norm": True, "moe.num_shared": 0},
        (
            *SIZES,
            EPS6,
            Key("moe_intermediate_size", "moe.ffn_size", 768),
            Key("num_experts", "moe.num_experts", 128, also="num_local_experts"),
            Key("num_experts_per_tok", "moe.top_k", 8),
            Key("decoder_sparse_step", "moe.every", 1),
            Key("norm_topk_prob", "moe.router", False, {True: "topk_softmax", False: "softmax_topk"}),
        ),
        {**NO_BIAS, "mlp_only_layers": ([], None)},
        "model.layers.",
        {
            **PRE,
            **_attention("q_norm", "k_norm"),
            **SWIGLU,
            **_places(
                ffn__router="mlp.gate",
                ffn__experts__gate="mlp.experts.{expert}.gate_proj",
                ffn__experts__down="mlp.experts.{expert}.down_proj",
                ffn__experts__up="mlp.experts.{expert}.up_proj",
            ),
        },
        OUTER,
        window="asked",
        default_window=4096,
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        GPT,
        (
            Key("vocab_size", "vocab_size"),
            Key("n_embd", "hidden_size"),
            Key("n_layer", "num_layers"),
            Key("n_head", "num_heads"),
            Key("n_inner", "ffn_size"),
            Key("initializer_range", "init_std", 0.02),
            Key("layer_norm_epsilon", "norm_eps", 1e-5),
            Key("tie_word_embeddings", "tie_embeddings", True),
            Key("activation_function", "ffn", "gelu_new", PLAIN_FFN),
        ),
        {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
        "transformer.h.",
        {
            **_places(attention_norm="ln_1", ffn_norm="ln_2"),
            **{f"attention.{n}": ModuleMap("attn.c_attn", True, part) for part, n in enumerate("qkv")},
            "attention.o": ModuleMap("attn.c_proj", True),
            "ffn.up": ModuleMap("mlp.c_fc", True),
            "ffn.down": ModuleMap("mlp.c_proj", True),
        },
        _places(embedding="transformer.wte", position="transformer.wpe", final_norm="transformer.ln_f", head="lm_head"),
        prefix="transformer.",
        theta=None,
        length="n_positions",
    ),
    Family(
        "bert",
        "BertForMaskedLM",
        {**GPT, "family": "encoder", "residual": "post", "embedding_norm": True, "mlm_head": True},
        (
            Key("vocab_size", "vocab_size"),
            Key("hidden_size", "hidden_size"),
            Key("num_hidden_layers", "num_layers"),
            Key("num_attention_heads", "num_heads"),
            Key("intermediate_size", "ffn_size"),
            Key("initializer_range", "init_std", 0.02),
            Key("layer_norm_eps", "norm_eps", 1e-12),
            Key("tie_word_embeddings", "tie_embeddings", True),
            Key("hidden_act", "ffn", "gelu", PLAIN_FFN),
        ),
        {"is_decoder": (False,), "add_cross_attention": (False,), "position_embedding_type": ("absolute",)},
        "bert.encoder.layer.",
        {
            **{f"attention.{n[0]}": ModuleMap(f"attention.self.{n}") for n in ("query", "key", "value")},
            **_places(attention__o="attention.output.dense", attention_norm="attention.output.LayerNorm", ffn_norm="output.LayerNorm"),
            **_places(ffn__up="intermediate.dense", ffn__down="output.dense"),
        },
        {
            **_places(embedding="bert.embeddings.word_embeddings", position="bert.embeddings.position_embeddings"),
            **_places(embedding_norm="bert.embeddings.LayerNorm", head="cls.predictions.decoder"),
            **_places(mlm__dense="cls.predictions.transform.dense", mlm__norm="cls.predictions.transform.LayerNorm"),
            "mlm": ModuleMap("cls.predictions", untied="cls.predictions.decoder"),
        },
        prefix="bert.",
        theta=None,
        segments="bert.embeddings.token_type_embeddings",
        unused=("bert.pooler.", "cls.seq_relationship."),
        also=("BertForPreTraining",),
    ),
    Family(
        "t5",
        "T5ForConditionalGeneration",
        {**LLAMA, "family": "encoder_decoder", "position": "relative", "attention_scale": 1.0, "share_embeddings": True},
        (
            Key("vocab_size", "vocab_size"),
            Key("d_model", "hidden_size"),
            Key("d_kv", "head_dim"),
            Key("d_ff", "ffn_size"),
            Key("num_heads", "num_heads"),
            Key("num_layers", "encoder_layers"),
            Key("num_decoder_layers", "num_layers", also="num_layers"),
            Key("relative_attention_num_buckets", "relative_buckets", 32),
            Key("relative_attention_max_distance", "relative_distance", 128),
            Key("layer_norm_epsilon", "norm_eps", 1e-6),
            Key("tie_word_embeddings", "tie_embeddings", True),
            Key("feed_forward_proj", "ffn", "relu", T5_FFN),
        ),
        {},
        "decoder.block.",
        {
            **_t5_attention("attention", "layer.0.SelfAttention"),
            **_t5_attention("cross", "layer.1.EncDecAttention"),
            **_t5_ffn("layer.2"),
        },
        {
            **_places(embedding="shared", encoder_norm="encoder.final_layer_norm", final_norm="decoder.final_layer_norm", head="lm_head"),
            **_places(relative="decoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
            **_places(source_relative="encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        },
        prefix="",
        theta=None,
        length="n_positions",
        default_length=512,
        copies=("encoder.embed_tokens", "decoder.embed_tokens"),
        encoder="encoder.block.",
        encoder_inner={**_t5_attention("attention", "layer.0.SelfAttention"), **_t5_ffn("layer.1")},
        unused=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.",),
        also=("T5WithLMHeadModel",),
    ),
)
BY_TYPE = {f.model_type: f for f in FAMILIES}

# Families that our models cannot be, with the reason.
NOT_HERE = {
    "roberta": "its positions begin behind its padding token; bert is read",
    "mt5": "it is T5 under another name; set model_type to t5 and architectures to T5ForConditionalGeneration, which its weights fit",
    "llama4": "its layers alternate between two attentions",
    "gemma2": "it caps logits and norms on both sides of a branch",
    "gemma3_text": "its layers alternate between two attentions",
    "qwen2": "it has biases on queries, keys and values alone",
    "gpt_oss": "its attention has sinks",
    "deepseek_v3": "its attention is latent",
}
