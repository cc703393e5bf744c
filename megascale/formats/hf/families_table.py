"""The table of Hugging Face families, for `megascale convert --list` and docs/formats.md."""

from __future__ import annotations

from megascale.formats.hf.families import FAMILIES, NOT_HERE

IN_WORDS = {
    "llama": "`rmsnorm`, `swiglu`, rope",
    "mistral": "… with `sliding_window`",
    "qwen2": "… with `attention_bias: qkv`; windows of some layers as `kinds`",
    "qwen3": "… with `qk_norm: true` (within each head); windows of some layers as `kinds`",
    "olmo2": "… with `residual: res_post`, `qk_norm: width` (over all heads)",
    "olmo3": "… and windows in three of four layers: `kinds: {sliding, full}`, whose rope scaling differs",
    "gemma3_text": "`residual: sandwich`, `norm: rmsnorm_1p`, `geglu_tanh`, `embedding_factor`; `kinds` with own windows and bases",
    "gemma2": "… with `attention_softcap`, `logit_softcap`, and one window in every second layer",
    "granite": "llama with `embedding_factor`, `attention_scale`, `head_scale` and a factor on branches (`layer_coefficients`)",
    "gpt_neox": "`layernorm`, `bias`, rope with `rope_fraction`, `residual: neox` (or `pre`), its q, k, v fused head by head",
    "phi3": "llama with fused products and `rope_fraction`; `longrope` is refused",
    "starcoder2": "`layernorm`, `bias`, `ffn: gelu_tanh`, rope",
    "gpt2": "`layernorm`, `bias`, `ffn: gelu_tanh` (or `gelu`, `relu`), `position: learned`, its products transposed, its q, k, v fused",
    "bloom": "`layernorm`, `bias`, `position: alibi`, `embedding_norm`, its q, k, v fused head by head",
    "mixtral": "`moe.router: topk_softmax`",
    "qwen3_moe": "`topk_softmax` if `norm_topk_prob`, otherwise `softmax_topk`; `moe.every` is `decoder_sparse_step`",
    "glm4_moe": "`moe.router: sigmoid`, `balance: bias`, `routed_scale`, `num_shared`; `kinds: {dense, experts}`; `mtp_depth`",
    "deepseek_v3": "… with `attention: latent`, `moe.groups`; YaRN's weights become `attention_scale`; fp8 blocks are undone",
    "gpt_oss": "`attention_sink: learned`, `swiglu_clamped`, biases of router and experts, YaRN without `truncate`; mxfp4 is undone",
    "qwen3_next": "`attention: gated_delta` in some layers, `attention_gate: channel`, `rmsnorm_1p`, `moe.shared_gate`; `mtp.` is left out",
    "bert": "`family: encoder`, `residual: post`, `layernorm`, `bias`, `position: learned`, `embedding_norm`, `mlm_head`; one segment",
    "t5": "`family: encoder_decoder`, `position: relative`, `attention_scale: 1.0`, `relu` and `head_scale` (1.0) or `geglu_tanh` (1.1)",
}


def markdown_table() -> str:
    """Both ways for all families that are here; then those that are not, with the reason."""
    rows = {f.model_type: (f, IN_WORDS[f.model_type]) for f in FAMILIES}
    lines = ["| `model_type` | architectures | here |", "|---|---|---|"]
    for kind in IN_WORDS:
        family, words = rows[kind]
        lines.append(f"| `{kind}` | {', '.join(f'`{a}`' for a in (family.architecture, *family.also))} | {words} |")
    return "\n".join([*lines, *(f"| `{kind}` | – | not here: {why} |" for kind, why in NOT_HERE.items())])
