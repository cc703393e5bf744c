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
# Linear attention: what one product makes, and whose convolutions are stored as one.
QKVZ, RATES = tuple(f"attention.{n}" for n in "qkvz"), ("attention.b", "attention.a")
TAPS = tuple(f"attention.{n}_conv" for n in "qkv")
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
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            **LLAMA,
            "ffn": "swiglu_clamped",
            "attention_bias": True,
            "attention_sink": "learned",
            "moe.router": "topk_softmax",
            "moe.every": 1,
            "moe.num_shared": 0,
            "moe.router_bias": True,
            "moe.expert_bias": True,
        },
        (
            *(k for k in SIZES if k.theirs != "head_dim"),
            Key("head_dim", "head_dim", 64),
            EPS5,
            Key("intermediate_size", "moe.ffn_size"),
            Key("num_local_experts", "moe.num_experts", 128, also="num_experts"),
            Key("num_experts_per_tok", "moe.top_k", 4),
        ),
        {**ACT, "attention_bias": (True,), "swiglu_limit": (7.0,), "swiglu_alpha": (1.702,)},
        "model.layers.",
        {
            **PRE,
            **attention(),
            "attention": ModuleMap("self_attn"),
            "ffn.router": ModuleMap("mlp.router", leaves={"logit_bias": ".bias"}),
            **{
                name: ModuleMap(
                    "mlp.experts.gate_up_proj",
                    paired=("ffn.experts.gate", "ffn.experts.up"),
                    transposed=True,
                    leaves={"weight": "", "bias": "_bias"},
                )
                for name in ("ffn.experts.gate", "ffn.experts.up")
            },
            "ffn.experts.down": ModuleMap("mlp.experts.down_proj", bank=True, transposed=True, leaves={"weight": "", "bias": "_bias"}),
        },
        OUTER,
        theta=150000.0,
        window="by_layer",
        default_window=128,
        full_every=2,
        rope=("truncate",),
        scaled={"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
        inert=("initial_context_length",),  # what rope_scaling says again
        same={"experts_per_token": "num_experts_per_tok"},
        quantized=("mxfp4",),
    ),
    Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {**LLAMA, "norm": "rmsnorm_1p", "qk_norm": True, "attention_gate": "channel", "moe.shared_gate": True},
        (
            *(k for k in SIZES if k.theirs != "head_dim"),
            Key("head_dim", "head_dim", 256),
            EPS6,
            Key("moe_intermediate_size", "moe.ffn_size", 512),
            Key("num_experts", "moe.num_experts", 512, also="num_local_experts"),
            Key("num_experts_per_tok", "moe.top_k", 10),
            Key("decoder_sparse_step", "moe.every", 1),
            Key("norm_topk_prob", "moe.router", True, {True: "topk_softmax", False: "softmax_topk"}),
            Key("shared_expert_intermediate_size", "moe.num_shared", 512, per="moe_intermediate_size"),
            Key("linear_num_key_heads", "delta.key_heads", 16),
            Key("linear_num_value_heads", "delta.value_heads", 32),
            Key("linear_key_head_dim", "delta.key_dim", 128),
            Key("linear_value_head_dim", "delta.value_dim", 128),
            Key("linear_conv_kernel_dim", "delta.conv_size", 4),
        ),
        {**NO_BIAS, "mlp_only_layers": ([], None)},
        "model.layers.",
        {
            **PRE,
            **attention("q_norm", "k_norm"),
            **{
                name: ModuleMap("self_attn.q_proj", by_head=("attention.q", "attention.gate")) for name in ("attention.q", "attention.gate")
            },
            **SWIGLU,
            **places(ffn__router="mlp.gate", ffn__shared_gate="mlp.shared_expert_gate"),
            **{f"ffn.experts.{n}": ModuleMap(f"mlp.experts.{{expert}}.{n}_proj") for n in ("gate", "up", "down")},
            **{f"ffn.shared.{n}": ModuleMap(f"mlp.shared_expert.{n}_proj") for n in ("gate", "up", "down")},
        },
        OUTER,
        window="linear",
        full_every=4,
        linear={"attention": "gated_delta", "attention_gate": None},
        linear_inner={
            **{name: ModuleMap("linear_attn.in_proj_qkvz", by_head=QKVZ, heads="delta.key_heads") for name in QKVZ},
            **{name: ModuleMap("linear_attn.in_proj_ba", by_head=RATES, heads="delta.key_heads") for name in RATES},
            **{name: ModuleMap("linear_attn.conv1d", fused=TAPS, taps=True) for name in TAPS},
            **places(attention__norm="linear_attn.norm", attention__o="linear_attn.out_proj"),
            "attention": ModuleMap("linear_attn"),
        },
        partial=True,
        share=0.25,
        unused=("mtp.",),
    ),
)
