"""Lengths of a model's sequences, and its dtypes for storage and computation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megascale.config.schema import Config


@dataclass(frozen=True)
class Shape:
    """What a model needs to know besides its config section."""

    seq_len: int
    storage: torch.dtype  # dtype of the weights
    compute: torch.dtype  # dtype of the activations
    source_len: int = 0  # length of an encoder–decoder's sources
    reduce: torch.dtype | None = None  # dtype in which FSDP2 sums gradients; None: that of the weights


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def shape_of(config: Config) -> Shape:
    """The shape of a model from the other sections of its config."""
    t, p = config.train, config.precision
    sources = t.source_length if config.model.encoder_layers else 0
    return Shape(t.seq_len, DTYPES[p.storage], DTYPES[p.compute], sources, None if p.reduce is None else DTYPES[p.reduce])
