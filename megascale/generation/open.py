"""A checkpoint of ours or a Hugging Face folder as a model to generate from, with its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megascale.checkpoint.streaming import ReadSlice
from megascale.config.load import build_config
from megascale.config.schema import Config, Model
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.formats.hf.folder import GENERATION, encoders, is_hf_folder
from megascale.formats.hf.model import read_hf
from megascale.formats.json_file import read_object
from megascale.formats.sources import open_checkpoint
from megascale.formats.tokenizer_files import find_prefix, find_tokenizer
from megascale.model.layers import Fp8


@dataclass(frozen=True)
class Opened:
    """An opened model: how to build the weights, the dtype to compute in, the tokenizer (None: not found), the end tokens from the
    generation config, else config.json (empty: the tokenizer knows), the product function, and the prefix of the data, whose facts say how
    documents began.
    """

    model: Model
    seq_len: int
    produce: ReadSlice
    dtype: torch.dtype
    tokenizer: Path | None
    ends: frozenset[int]
    fp8: Fp8 = "false"
    prefix: str | None = None


def open_model(path: Path, average: str | None = None) -> Opened:
    """Raises UsageError if the path is no model, or not one that generates text. `average` as in `open_checkpoint`."""
    found = open_any(path, average)
    if found.model.family != "decoder":
        raise UsageError(f"{path} is of family {found.model.family}, but only a decoder generates text: give a decoder's checkpoint")
    return found


def open_any(path: Path, average: str | None = None) -> Opened:
    """Opens a model of any family. Raises UsageError if the path is no model. `average` as in `open_checkpoint`."""
    if is_hf_folder(path):
        if average is not None:
            raise UsageError(f"--ema is {average}, but {path} is a Hugging Face folder, which has one set of weights: leave it out")
        foreign = read_hf(path)
        dtype = max((t.dtype for t in foreign.targets), key=lambda d: d.itemsize)
        said = read_object(path / GENERATION) if (path / GENERATION).is_file() else foreign.config
        tokenizer = path if encoders(path) else None
        return Opened(foreign.model, foreign.seq_len, foreign.produce, dtype, tokenizer, ends_of(said))
    ours = open_checkpoint(path, average)
    section = ours.config.get("precision")
    precision = section if isinstance(section, Mapping) else {}
    compute = {"bf16": torch.bfloat16, "fp64": torch.float64}.get(str(precision.get("compute")), torch.float32)
    tokenizer, static = find_tokenizer(ours.config, ours.folder), precision.get("fp8") == "static"
    generation = ours.trainer.get("hf_generation_config", ours.trainer.get("hf_config"))
    ends = ends_of(generation if isinstance(generation, Mapping) else {})
    return Opened(
        ours.model, ours.seq_len, ours.source.read, compute, tokenizer, ends, "static" if static else "false", find_prefix(ours.config)
    )


def ends_of(generation: Mapping[str, Any]) -> frozenset[int]:
    """`eos_token_id` of a generation config, or of config.json if that has none: one number, several, or none."""
    ends = generation.get("eos_token_id")
    return frozenset(e for e in (ends if isinstance(ends, list) else [ends]) if type(e) is int)


def layout(opened: Opened, ranks: int, device: str) -> Config:
    """The config for inference, with all ranks on tp. Raises UsageError if the model cannot be sharded over that many."""
    model = opened.model.model_dump(mode="json")
    for part in (model, *model.get("kinds", {}).values()):
        if part.get("moe"):
            part["moe"]["capacity_factor"] = None  # an expert that overflows in training does not, one token at a time
    values = {
        "run": {"device": device},
        "model": model,
        "parallel": {"tp": ranks, "dp_shard": 1},
        "train": {"steps": 1, "seq_len": opened.seq_len},
        "optim": {"weight_decay": 0.0},  # nothing is trained: unit scaling's rules about decay do not apply
        "precision": {"fp8": opened.fp8},
        "data": {"train": "none"},
    }
    return check(build_config(values), ranks)
