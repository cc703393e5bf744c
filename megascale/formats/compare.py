"""The proof of a conversion: the largest difference of logits between our model and transformers' own on given tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from megascale.checkpoint.streaming import Produce
from megascale.comm.mesh import AXES, EXPERT_AXES, build_mesh
from megascale.config.schema import Model, Parallel
from megascale.errors import UsageError
from megascale.formats.load import load_model


@torch.no_grad()
def our_logits(model: Model, seq_len: int, produce: Produce, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """tokens [b, s] → logits [b, s, V] of this process alone."""
    mesh = build_mesh(dict.fromkeys((*AXES, *EXPERT_AXES), 1), "cpu")
    built = load_model(model, seq_len, produce, mesh, Parallel(), torch.device("cpu"), dtype)
    return built.module(tokens)  # type: ignore[no-any-return]


@torch.no_grad()
def hf_logits(folder: str | Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What transformers computes from a folder: logits [b, s, V]. Raises UsageError where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UsageError(
            "logits are compared with transformers, which is not installed: pip install 'megascale[hf]', or leave --tokens out"
        )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), torch_dtype=dtype, local_files_only=True).eval()
    return model(tokens).logits  # type: ignore[no-any-return]


def largest_difference(model: Model, seq_len: int, produce: Produce, folder: str | Path, tokens: list[int]) -> float:
    """max |Δlogit| in fp32. Both models are in memory, one after the other."""
    assert model.vocab_size is not None
    wrong = [t for t in tokens if not 0 <= t < model.vocab_size]
    if wrong or not tokens or len(tokens) > seq_len:
        what = f"holds {wrong[0]}" if wrong else f"has {len(tokens)} numbers"
        raise UsageError(f"--tokens {what}, and the model reads 1 to {seq_len} numbers below {model.vocab_size}: give such tokens")
    row = torch.tensor([tokens])
    theirs = hf_logits(folder, row)
    return (our_logits(model, seq_len, produce, row) - theirs).abs().max().item()
