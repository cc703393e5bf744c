"""Pairs that can be learned: a target is its source backwards, one letter on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megascale.data.indexed import TokenWriter
from tests.runs import settings

VOCAB, END = 40, 1


def make_pairs(prefix: Path, count: int = 80, longest: int = 10) -> str:
    """PREFIX.source and PREFIX.target with `count` pairs of at most `longest` tokens with the end, and what is known of them."""
    random = np.random.default_rng(0)
    sources = [random.integers(2, VOCAB, random.integers(2, longest)) for _ in range(count)]
    for side, texts in (("source", sources), ("target", [(s[::-1] - 1) % (VOCAB - 2) + 2 for s in sources])):
        with TokenWriter(f"{prefix}.{side}", np.uint16) as writer:
            for text in texts:
                writer.add(np.append(text, END))
        Path(f"{prefix}.{side}.json").write_text(json.dumps({"eos_id": END, "vocab_size": VOCAB}))
    return str(prefix)


def pair_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of 6 steps in fp64."""
    family = {"model__family": "encoder_decoder", "model__encoder_layers": 2, "model__vocab_size": VOCAB}
    return settings(folder, **{**family, "train__source_len": 10, "train__seq_len": 12, **changes})
