"""Families with mixtures of today: latent attention, grouped routing, sinks, linear attention."""

from __future__ import annotations

from megascale.formats.hf.family import (
    ACT,
    EPS5,
    EPS6,
    LLAMA,
    NO_BIAS,
    OUTER,
    PRE,
    SIZES,
    SWIGLU,
    Family,
    Key,
    ModuleMap,
    attention,
    places,
)

NORMED = Key("norm_topk_prob", "moe.renormalize", True, {True: True, False: False})
# DeepSeek-V3's mixture: sigmoid gates, a bias for the choice that is no weight, shared experts.
DEEPSEEK = {"moe.router": "sigmoid", "moe.balance": "bias", "moe.every": 1, "moe.group_score": "top2"}
DEEPSEEK_KEYS = (
    Key("moe_intermediate_size", "moe.ffn_size"),
    Key("n_routed_experts", "moe.num_experts", also="num_local_experts"),
    Key("num_experts_per_tok", "moe.top_k", 8),
    Key("n_shared_experts", "moe.num_shared", 1),
    Key("n_group", "moe.groups", 1, neutral=1),
    Key("topk_group", "moe.top_groups", 1, neutral=1),
    Key("num_nextn_predict_layers", "mtp_depth", 0, also="num_mtp_layers"),
    NORMED,
)
DEEPSEEK_FFN = {
    **SWIGLU,
    "ffn.router": ModuleMap("mlp.gate", leaves={"bias": ".e_score_correction_bias"}),
    **{f"ffn.experts.{n}": ModuleMap(f"mlp.experts.{{expert}}.{n}_proj") for n in ("gate", "up", "down")},
    **{f"ffn.shared.{n}": ModuleMap(f"mlp.shared_experts.{n}_proj") for n in ("gate", "up", "down")},
}
# A module of multi-token prediction joins the embedding with the stream in this order, ours in the other.
AHEAD = {"join": ModuleMap("eh_proj", swapped=True), **places(hidden_norm="hnorm", token_norm="enorm", norm="shared_head.norm")}
AHEAD_COPIES = {"embed_tokens": "embedding", "shared_head.head": "head"}
KV = ("attention.k", "attention.v")

MIXTURES: tuple[Family, ...] = (
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {**LLAMA, **DEEPSEEK},
        (
            *SIZES,
            EPS5,
            *DEEPSEEK_KEYS,
            Key("routed_scaling_factor", "moe.routed_scale", 1.0),
            Key("use_qk_norm", "qk_norm", False, {True: True, False: False}),
            Key("attention_bias", "attention_bias", False, {True: "qkv", False: False}),
        ),
        ACT,
        "model.layers.",
        {**PRE, **attention("q_norm", "k_norm"), **DEEPSEEK_FFN},
        OUTER,
        partial=True,
        share=0.5,
        dense_first="first_k_dense_replace",
        ahead=AHEAD,
        ahead_copies=AHEAD_COPIES,
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        # The norms of latents have this epsilon whatever rms_norm_eps is.
        {**LLAMA, **DEEPSEEK, "attention": "latent", "norm_eps_of.latent_norm": 1e-6},
        (
            *(k for k in SIZES if k.theirs != "head_dim"),
            EPS6,
            *DEEPSEEK_KEYS,
            Key("routed_scaling_factor", "moe.routed_scale", 2.5),
            Key("qk_nope_head_dim", "head_dim", 128),
            Key("kv_lora_rank", "latent.kv_rank", 512),
            Key("q_lora_rank", "latent.query_rank", 1536),
            Key("qk_rope_head_dim", "latent.rope_dim", 64),
            Key("v_head_dim", "latent.value_dim", 128),
            Key("rope_interleave", "rope_interleaved", True, {True: True, False: False}),
        ),
        {**NO_BIAS, "moe_layer_freq": (1,), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
        "model.layers.",
        {
            **PRE,
            "attention.q_down": ModuleMap("self_attn.q_a_proj"),
            "attention.q_norm": ModuleMap("self_attn.q_a_layernorm"),
            "attention.q": ModuleMap("self_attn.q_b_proj", direct="self_attn.q_proj"),
            "attention.kv_down": ModuleMap("self_attn.kv_a_proj_with_mqa"),
            "attention.kv_norm": ModuleMap("self_attn.kv_a_layernorm"),
            **{name: ModuleMap("self_attn.kv_b_proj", by_head=KV) for name in KV},
            "attention.o": ModuleMap("self_attn.o_proj"),
            **DEEPSEEK_FFN,
        },
        OUTER,
        inert=("qk_head_dim", "ep_size", "seq_aux", "aux_loss_alpha", "auto_map"),
        rope=("mscale",),
        dense_first="first_k_dense_replace",
        same={"head_dim": "qk_rope_head_dim", "num_key_value_heads": "num_attention_heads"},
        quantized=("fp8",),
        ahead=AHEAD,
        ahead_copies=AHEAD_COPIES,
    ),
)
