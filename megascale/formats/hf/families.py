"""Hugging Face's model families as data, and those that cannot be read, with the reason."""

from __future__ import annotations

from megascale.formats.hf.families_moe import MIXTURES
from megascale.formats.hf.families_new import NEWER
from megascale.formats.hf.family import (
    ACT,
    EPS5,
    EPS6,
    GPT,
    LLAMA,
    NO_BIAS,
    OUTER,
    PLAIN_FFN,
    PRE,
    SIZES,
    SWIGLU,
    T5_FFN,
    Family,
    Key,
    ModuleMap,
    attention,
    places,
)


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


FIRST: tuple[Family, ...] = (
    Family(
        "llama",
        "LlamaForCausalLM",
        LLAMA,
        (*SIZES, EPS6),
        {**NO_BIAS, "mlp_bias": (False,)},
        "model.layers.",
        {**PRE, **attention(), **SWIGLU},
        OUTER,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        LLAMA,
        (*SIZES, EPS6),
        ACT,
        "model.layers.",
        {**PRE, **attention(), **SWIGLU},
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
        {**PRE, **attention("q_norm", "k_norm"), **SWIGLU},
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
            **places(attention_norm="post_attention_layernorm", ffn_norm="post_feedforward_layernorm"),
            **attention("q_norm", "k_norm"),
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
            **attention(),
            **places(
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
            **attention("q_norm", "k_norm"),
            **SWIGLU,
            **places(
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
            **places(attention_norm="ln_1", ffn_norm="ln_2"),
            **{f"attention.{n}": ModuleMap("attn.c_attn", True, part) for part, n in enumerate("qkv")},
            "attention.o": ModuleMap("attn.c_proj", True),
            "ffn.up": ModuleMap("mlp.c_fc", True),
            "ffn.down": ModuleMap("mlp.c_proj", True),
        },
        places(embedding="transformer.wte", position="transformer.wpe", final_norm="transformer.ln_f", head="lm_head"),
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
            **places(attention__o="attention.output.dense", attention_norm="attention.output.LayerNorm", ffn_norm="output.LayerNorm"),
            **places(ffn__up="intermediate.dense", ffn__down="output.dense"),
        },
        {
            **places(embedding="bert.embeddings.word_embeddings", position="bert.embeddings.position_embeddings"),
            **places(embedding_norm="bert.embeddings.LayerNorm", head="cls.predictions.decoder"),
            **places(mlm__dense="cls.predictions.transform.dense", mlm__norm="cls.predictions.transform.LayerNorm"),
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
            **places(embedding="shared", encoder_norm="encoder.final_layer_norm", final_norm="decoder.final_layer_norm", head="lm_head"),
            **places(relative="decoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
            **places(source_relative="encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
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
FAMILIES: tuple[Family, ...] = (*FIRST, *NEWER, *MIXTURES)
BY_TYPE = {f.model_type: f for f in FAMILIES}

# Families that our models cannot be, with the reason.
NOT_HERE = {
    "roberta": "its positions begin behind its padding token; bert is read",
    "mt5": "it is T5 under another name; set model_type to t5 and architectures to T5ForConditionalGeneration, which its weights fit",
    "llama4": "its layers alternate between two attentions",
}
