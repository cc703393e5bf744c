"""Keys and values of config.json files that people have: harmless ones pass, those that change logits are refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.formats.hf.config import hf_config, model_section
from megascale.formats.hf.families_table import markdown_table
from megascale.generation.open import ends_of
from megascale.model.position import inverse_frequencies, pair_exponents
from tests.layouts import tiny

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
QWEN3 = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 8}
MISTRAL = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "n_positions": 64,
}  # fmt: skip
BERT = {**LLAMA, "model_type": "bert", "architectures": ["BertForMaskedLM"]}
del BERT["num_key_value_heads"], BERT["rms_norm_eps"]
T5: dict[str, Any] = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48,
    "num_layers": 2, "num_heads": 4,
}  # fmt: skip
# Where they were seen → the config of the model, what it says beside.
HARMLESS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SmolLM, nanotron": (LLAMA, {"is_llama_config": True, "rope_interleaved": False}),
    "SmolLM2 for the web": (LLAMA, {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}}),
    "distilgpt2": (
        GPT2,
        {
            "_num_labels": 1,
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "task_specific_params": {"text-generation": {"do_sample": True}},
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "n_ctx": 1024,
        },
    ),
    "Unsloth": (LLAMA, {"unsloth_fixed": True, "unsloth_version": "2025.1.5", "pad_token_id": 4}),
    "transformers 4.46": (LLAMA, {"_attn_implementation_autoset": True}),
    "transformers 4.35": (LLAMA, {"_flash_attn_2_enabled": True}),
    "old conversions": (LLAMA, {"max_sequence_length": 2048, "pad_token_id": 0, "pretraining_tp": 1}),
    "chat models": (LLAMA, {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_length": 4096, "top_k": 50, "num_beams": 1}),
    "everywhere": (
        LLAMA,
        {
            "return_dict": True,
            "output_attentions": False,
            "use_bfloat16": False,
            "pruned_heads": {},
            "chunk_size_feed_forward": 0,
            "tie_encoder_decoder": False,
            "finetuning_task": "x",
            "prefix": "x",
            "problem_type": "regression",
            "add_cross_attention": False,
            "cross_attention_hidden_size": None,
            "forced_eos_token_id": 3,
            "resid_pdrop": 0.1,
            "attention_dropout": 0.5,
            "classifier_dropout": 0.1,
        },
    ),
    "BERT with its other head": (BERT, {"architectures": ["BertForPreTraining"], "pooler_type": "first_token_transform"}),
    "T5 1.0": (T5, {"architectures": ["T5WithLMHeadModel"], "output_past": True}),
    "Qwen3 whose layers are all full": (QWEN3, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "the same, said by layer": (
        QWEN3,
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 2, "max_window_layers": 28},
    ),
    "two spellings that agree": (
        LLAMA,
        {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
}


@pytest.mark.parametrize("seen", HARMLESS)
def test_harmless_keys_pass(seen: str) -> None:
    """Catches a model of thousands of users that is refused for a key that no logit depends on, and one that is read as another for it."""
    plain, more = HARMLESS[seen]
    assert model_section({**plain, **more}, "config.json") == model_section(plain, "config.json")


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "pairs of neighbours": (LLAMA, {"rope_interleaved": True}, "rope_interleaved is True, but only False is supported"),
    "dynamic": (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    "su": (LLAMA, {"rope_scaling": {"type": "su", "long_factor": [1.0]}}, "rope_type is 'su'"),
    "longrope": (LLAMA, {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, "rope_type is 'longrope'"),
    "quantized": (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, which is not understood"),
    "a bias elsewhere": (MISTRAL, {"mlp_bias": True}, "mlp_bias is True, which is not understood"),
    "nested by layer type": (
        LLAMA,
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}}},
        "rope_parameters is nested by layer type (full_attention, sliding_attention)",
    ),
    "more in default positions": (LLAMA, {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2]}}, "mrope_section is [2, 2]"),
    "two spellings": (
        LLAMA,
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "rope_parameters and rope_scaling say different things",
    ),
    "two bases": (
        LLAMA,
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "rope_theta is 500000.0, but rope_parameters says 10000.0",
    ),
    "pruned": (BERT, {"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': [1]}, but only {} is supported"),
    "chunks": (QWEN3, {"layer_types": ["full_attention", "chunked_attention"]}, "it must be a list of full_attention and sliding"),
    "windows without a length": (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, "there is no sliding_window"),
    "other layers than layers": (QWEN3, {"layer_types": ["full_attention"]}, "layer_types has 1 entries, but there are 2 layers"),
    "an activation in a list": (GPT2, {"activation_function": ["gelu"]}, "activation_function is ['gelu']"),
    "layers in a mapping": (LLAMA, {"num_hidden_layers": {"a": 1}}, "model.num_layers would be {'a': 1}"),
    "kinds that are a number": (QWEN3, {"layer_types": 3}, "layer_types is 3, but it must be a list"),
    "an architecture that is a number": (LLAMA, {"architectures": 1}, "architectures is 1, and of llama"),
    "no vocabulary": (LLAMA, {"vocab_size": None}, "has no vocab_size"),
    "a length below zero": (LLAMA, {"max_position_embeddings": -5}, "max_position_embeddings is -5"),
    "θ of another type": (LLAMA, {"rope_theta": [1]}, "model.rope_theta would be [1]"),
    "a share of another type": (LLAMA, {"partial_rotary_factor": "x"}, "partial_rotary_factor is 'x'"),
    "a wide value": (LLAMA, {"odd": ["x" * 50] * 50}, "xxx…, which is not understood"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_changes_logits_is_refused_by_name(case: str) -> None:
    """Catches a key that is ignored though logits depend on it, and a value of an odd type that ends in a traceback."""
    plain, more, words = REFUSED[case]
    with pytest.raises(UsageError) as error:
        model_section({**plain, **more}, "config.json")
    assert words in str(error.value), str(error.value)
    assert len(str(error.value)) < 600


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**30), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=4),
    st.lists(st.integers(0, 3), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
    st.sampled_from(["silu", "yarn", "linear", "full_attention"]),
)  # fmt: skip


@pytest.mark.parametrize("plain", [LLAMA, QWEN3, GPT2, BERT, T5], ids=lambda c: c["model_type"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_odd_values_are_sentences(plain: dict[str, Any], data: st.DataObject) -> None:
    """Catches anything but a model or one sentence, for any JSON value under any key."""
    keys = [*plain, "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "use_sliding_window"]
    keys += ["max_window_layers", "type_vocab_size", "tie_word_embeddings", "hidden_act", "feed_forward_proj", "head_dim", "n_inner"]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=3))
    try:
        model, length = model_section({**plain, **changes}, "config.json")
    except UsageError:
        return
    assert model.vocab_size is not None and (length is None or length > 0)


def test_ends_come_from_the_config_where_nothing_else_says_them() -> None:
    """Catches generation that runs to its limit, since a folder has no generation_config.json; and true taken for token 1."""
    assert ends_of({**LLAMA, "eos_token_id": [3, 5]}) == {3, 5} and ends_of({**LLAMA, "eos_token_id": 7}) == {7}
    assert ends_of({"eos_token_id": True}) == ends_of({"eos_token_id": None}) == ends_of({"eos_token_id": [[3]]}) == set()


# What two versions of transformers make of a config (modeling_rope_utils.py: _compute_yarn_parameters), for heads of 16 channels.


def yarn(config: dict[str, Any], factor: float, original: int) -> tuple[torch.Tensor, float]:
    scaling, dim, base = config["rope_scaling"], 16, config["rope_theta"]
    amplitude = scaling.get("attention_factor") or (1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0)

    def channel(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(channel(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(channel(scaling.get("beta_slow") or 1)), dim - 1)
    turns = base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / ((high - low) or 1e-3)).clamp(0, 1)
    return ramp / (factor * turns) + (1 - ramp) / turns, amplitude


def yarn_of_4_51(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    original = config["rope_scaling"].get("original_max_position_embeddings")
    longest = config["max_position_embeddings"]
    return yarn(config, config["rope_scaling"]["factor"] if original is None else longest / original, original or longest)


def yarn_of_5(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    original = config["rope_scaling"].get("original_max_position_embeddings") or config["max_position_embeddings"]
    return yarn(config, config["rope_scaling"]["factor"], original)


@pytest.mark.parametrize("length", [64, 256, 100, 40])
@pytest.mark.parametrize("factor", [4.0, 2.5, 1.3])
@pytest.mark.parametrize("attention", [None, 1.2])
@pytest.mark.parametrize("new", [False, True])
def test_yarn_is_exported_as_every_version_reads_it(length: int, factor: float, attention: float | None, new: bool) -> None:
    """Catches YaRN of another factor in transformers 4.51, which takes it from max_position_embeddings where the original length is stored;
    and rope_parameters, which it does not know.
    """
    scaling = {"type": "yarn", "factor": factor, "original_seq_len": 64, "attention_factor": attention}
    model = tiny(hidden_size=64, num_heads=4, head_dim=16, rope_scaling=scaling, rope_theta=500.0)
    config = hf_config(model, length, {**LLAMA, "max_position_embeddings": length, "rope_parameters": {}} if new else None)
    assert "rope_parameters" not in config
    assert model.rope_scaling is not None
    want = inverse_frequencies(pair_exponents(16, None, torch.device("cpu")), 500.0, model.rope_scaling)
    for read in (yarn_of_4_51, yarn_of_5):
        frequencies, amplitude = read(config)
        torch.testing.assert_close(frequencies, want, rtol=1e-12, atol=0)
        assert amplitude == pytest.approx(model.rope_scaling.amplitude)
    again, _ = model_section(config, "the export")
    assert again.rope_scaling == model.rope_scaling


def test_numbers_and_depths_of_files(tmp_path: Path) -> None:
    """Catches tracebacks of the JSON library, and numbers that JSON does not have."""
    from megascale.formats.json_file import read_object

    path = tmp_path / "config.json"
    for text, words in (
        ("[" * 200_000, "nested too deep"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read (Exceeds the limit"),
        ('{"a": NaN}', "NaN is not a number in JSON"),
        ('{"a": 1e999}', "1e999 is beyond any float"),
        ("{", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
    ):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UsageError) as error:
            read_object(path)
        assert words in str(error.value) and str(path) in str(error.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match="is not a file"):
        read_object(path)
    path.rmdir()
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(LLAMA).encode())
    assert read_object(path) == LLAMA, "a byte-order mark is no damage"


def test_models_are_models() -> None:
    """Catches a table of this file that says nothing, as a config that is refused for another reason would."""
    assert all(isinstance(model_section(c, "c")[0], Model) for c in (LLAMA, QWEN3, MISTRAL, GPT2, BERT, T5))


def test_the_table_of_families_is_in_the_docs() -> None:
    """Catches a family without a line in the page that `convert --list` prints."""
    text = Path("docs/formats.md").read_text(encoding="utf-8")
    assert markdown_table() in text, "docs/formats.md: put the output of `megascale convert --list` between the marks"
