"""Keys of a config.json that do not affect logits, in groups with a reason.

A family's own keys are in its table (families.py). The forward pass of no family in that table reads the keys here, whatever their value; a
few may have only one value. A key in neither place is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Reason → keys.
HARMLESS: Mapping[str, frozenset[str]] = {
    "which class, which files, which version": frozenset(
        [
            "architectures", "model_type", "transformers_version", "tokenizer_class", "name_or_path", "_name_or_path", "_commit_hash",
            "transformers.js_config", "transformers_weights", "torch_dtype", "dtype", "use_bfloat16", "torchscript", "xla_device",
            "tf_legacy_loss", "is_llama_config",
        ]
    ),
    "how the forward pass is computed, not what": frozenset(
        [
            "use_cache", "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
            "_experts_implementation", "_flash_attn_2_enabled", "use_flash_attn", "gradient_checkpointing", "chunk_size_feed_forward",
            "pretraining_tp", "reorder_and_upcast_attn", "experts_implementation",
        ]
    ),
    "what is returned beside logits": frozenset(
        ["output_attentions", "output_hidden_states", "output_past", "output_router_logits", "return_dict", "use_return_dict"]
    ),
    "heads for other tasks, and their labels": frozenset(
        [
            "id2label", "label2id", "num_labels", "_num_labels", "finetuning_task", "problem_type", "task_specific_params", "prefix",
            "directionality",
        ]
    ),
    "training alone": frozenset(["router_aux_loss_coef", "router_jitter_noise", "initializer_factor", "label_smoothing", "z_loss"]),
    "what another key says, or is read with it": frozenset(
        [
            "is_encoder_decoder", "is_decoder", "n_ctx", "max_sequence_length", "model_max_length", "max_window_layers",
            "type_vocab_size",  # segments but the first are not read
            "dense_act_fn", "is_gated_act", "scale_decoder_outputs",  # of T5, read with feed_forward_proj and tie_word_embeddings
        ]
    ),
    "generation: what generation_config.json says again": frozenset(
        [
            "assistant_confidence_threshold", "assistant_early_exit", "bad_words_ids", "begin_suppress_tokens", "cache_implementation",
            "constraints", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
            "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "force_words_ids", "forced_decoder_ids", "guidance_scale",
            "length_penalty", "low_memory", "max_length", "max_new_tokens", "max_time", "min_length", "min_new_tokens", "min_p",
            "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups", "num_beams",
            "num_return_sequences", "output_logits", "output_scores", "penalty_alpha", "prompt_lookup_num_tokens", "remove_invalid_values",
            "renormalize_logits", "repetition_penalty", "return_dict_in_generate", "sequence_bias", "stop_strings", "suppress_tokens",
            "temperature", "top_h", "top_k", "top_p", "typical_p", "watermarking_config",
        ]
    ),
}  # fmt: skip
# Reason → pattern for groups of such keys.
PATTERNS: Mapping[str, re.Pattern[str]] = {
    "the number of a token with a meaning": re.compile(r"[a-z_]*_token_ids?"),
    "dropout, which acts in training alone": re.compile(r"[a-z_]*(dropout|pdrop)(_rate|_prob)?"),
    "heads for other tasks": re.compile(r"(summary|pooler|classifier)_[a-z_]*"),
    "marks of the program that saved it": re.compile(r"unsloth_[a-z_]*"),
}
# Keys that may only have these values in any config; others change logits.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "rope_interleaved": (False,),  # of nanotron: queries and keys in pairs of neighbours
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
_KEYS = frozenset[str]().union(*HARMLESS.values())


def harmless(key: str) -> bool:
    """Whether the key never affects logits."""
    return key in _KEYS or any(p.fullmatch(key) for p in PATTERNS.values())
