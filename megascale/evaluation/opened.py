"""A checkpoint of ours or a Hugging Face folder, open to score texts: on one process, or with its weights over tensor ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megascale.comm.agreement import on_all_ranks
from megascale.comm.mesh import build_mesh
from megascale.config.layout import axis_sizes
from megascale.data.tokenizer import Tokenizer
from megascale.errors import UsageError
from megascale.evaluation.score import Scorer
from megascale.formats.convert import parse_dtype
from megascale.formats.load import load_model
from megascale.formats.tokenizer_build import open_tokenizer
from megascale.generation.open import layout, open_model
from megascale.launch.ranks import find_ranks
from megascale.parallel.model import ParallelModel
from megascale.schedule.accumulate import Accumulation
from megascale.train.device import choose_device
from megascale.train.process_group import process_group


@dataclass(frozen=True)
class OpenModel:
    model: ParallelModel
    scorer: Scorer
    tokenizer: Tokenizer
    ends: frozenset[int]
    first: bool  # whether this is rank 0

    @property
    def vocab_size(self) -> int:
        return self.model.model.cfg.vocab_enabled or self.model.model.cfg.vocab_size or 0


@contextmanager
def opened(checkpoint: Path, tokenizer: Path | None, batch: int, dtype: str | None, device: str) -> Iterator[OpenModel]:
    """Raises UsageError if the path is no decoder or has no tokenizer. `batch`: texts per forward pass."""
    found = open_model(checkpoint)
    path = tokenizer or found.tokenizer
    if path is None:
        raise UsageError("there is no tokenizer next to the checkpoint or its data: give --tokenizer")
    text, ranks = open_tokenizer(path, found.prefix), find_ranks()
    config = layout(found, ranks.size, device)
    where = choose_device(config, ranks)
    with process_group(config, ranks):
        mesh = build_mesh(axis_sizes(config.parallel, ranks.size), where.type)
        computed = parse_dtype(dtype) or found.dtype
        model = on_all_ranks(
            lambda: load_model(config.model, found.seq_len, found.produce, mesh, config.parallel, where, computed, found.fp8)
        )
        scorer = Scorer(model, Accumulation(model).evaluate, where, found.seq_len, batch, batch, packed=False)
        with torch.no_grad():
            yield OpenModel(model, scorer, text, found.ends, ranks.rank == 0)
