"""Verifies a conversion by the largest difference of logits between our model and transformers' on given tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from megascale.checkpoint.streaming import ReadSlice
from megascale.comm.mesh import build_mesh
from megascale.config.axes import EXPERT_AXES, NAMES
from megascale.config.schema import Model, Parallel
from megascale.errors import UsageError
from megascale.formats.load import load_model


@torch.no_grad()
def our_logits(model: Model, seq_len: int, produce: ReadSlice, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """tokens [b, s] → logits [b, s, V] in this process. An encoder–decoder gets them as source and as target."""
    mesh = build_mesh(dict.fromkeys((*NAMES, *EXPERT_AXES), 1), "cpu")
    built = load_model(model, seq_len, produce, mesh, Parallel(), torch.device("cpu"), dtype)
    pair = {"source": tokens} if model.family == "encoder_decoder" else {}
    return built.module(tokens, **pair)  # type: ignore[no-any-return]


def check_comparable(model: Model, seq_len: int, tokens: list[int] | None) -> None:
    """Raises UsageError if logits cannot be compared on `tokens` (None: not requested), before anything is written."""
    assert model.vocab_size is not None
    if tokens is None:
        return
    if importlib.util.find_spec("transformers") is None:
        raise UsageError(
            "logits are compared with transformers, which is not installed: pip install 'megascale[hf]', or leave --tokens out"
        )
    wrong = [t for t in tokens if not 0 <= t < model.vocab_size]
    if wrong or not tokens or len(tokens) > seq_len:
        what = f"holds {wrong[0]}" if wrong else f"has {len(tokens)} numbers"
        raise UsageError(f"--tokens {what}, and the model reads 1 to {seq_len} numbers below {model.vocab_size}: give such tokens")


@torch.no_grad()
def hf_logits(folder: str | Path, tokens: torch.Tensor, family: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same logits from transformers for a folder of a language model; `family` is our name."""
    import transformers

    names = {"encoder": "AutoModelForMaskedLM", "encoder_decoder": "AutoModelForSeq2SeqLM"}
    kind = getattr(transformers, names.get(family, "AutoModelForCausalLM"))
    model = kind.from_pretrained(str(folder), torch_dtype=dtype, local_files_only=True).eval()
    pair = {"decoder_input_ids": tokens} if family == "encoder_decoder" else {}
    return model(tokens, **pair).logits  # type: ignore[no-any-return]


def largest_difference(model: Model, seq_len: int, produce: ReadSlice, folder: str | Path, tokens: list[int]) -> float:
    """max |Δlogit| in fp32 on tokens checked by `check_comparable`. Both models are in memory, one after the other."""
    row = torch.tensor([tokens])
    theirs = hf_logits(folder, row, model.family)
    return (our_logits(model, seq_len, produce, row) - theirs).abs().max().item()
