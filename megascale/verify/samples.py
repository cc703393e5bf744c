"""Random samples that depend on their numbers only, for every family: no data needed, and the same on every layout."""

from __future__ import annotations

import torch
from torch import Tensor

from megascale.config.schema import Config, Spacetime
from megascale.data.loader import Batch
from megascale.model.shape import DTYPES


def random_batch(config: Config, numbers: list[int], packed: bool | None = None) -> Batch:
    """Random tokens, with `packed` (default: as `train.packing` says) in random documents with uncounted targets. Sources end anywhere. A
    negative number is an empty place.
    """
    model, seq_len = config.model, config.train.seq_len
    if model.spacetime is not None:
        return _fields(model.spacetime, numbers, DTYPES[config.precision.compute])
    packed = config.train.packing == "documents" if packed is None else packed
    vocab = model.vocab_size
    assert vocab is not None
    rows, documents = [], []
    for n in numbers:
        generator = torch.Generator().manual_seed(1000 + n)
        rows.append(torch.randint(0, vocab, (seq_len + 1,), generator=generator))
        documents.append((torch.rand(seq_len, generator=generator) < 0.2).cumsum(0))
    tokens, docs = torch.stack(rows), torch.stack(documents)
    targets = tokens[:, 1:].clone()
    positions = None
    if packed:
        targets[:, :-1][docs[:, 1:] != docs[:, :-1]] = -1
        begins = torch.where(docs != torch.nn.functional.pad(docs[:, :-1], (1, 0), value=-1), torch.arange(seq_len), 0)
        positions = torch.arange(seq_len) - begins.cummax(1).values
    targets[torch.tensor(numbers) < 0] = -1
    source = None
    if model.encoder_layers:
        source = _texts(numbers, config.train.source_length, model.source_vocab_size or vocab)
        targets[torch.arange(seq_len) > 3 + torch.tensor(numbers)[:, None] % seq_len] = -1
    return Batch(tokens[:, :-1], targets, docs if packed else None, positions, torch.tensor(numbers), int((targets >= 0).sum()), source)


def _texts(numbers: list[int], places: int, vocab: int) -> Tensor:
    """[b, places] tokens that depend on the sample number only, −1 beyond an end of its own; an empty place has none."""
    source = torch.full((len(numbers), places), -1)
    for row, n in enumerate(numbers):
        length = 1 + (5 * n + 2) % places if n >= 0 else 0
        source[row, :length] = torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(5000 + n))
    return source


def _fields(fields: Spacetime, numbers: list[int], dtype: torch.dtype) -> Batch:
    """Random fields that depend on the sample number only, a random half of the patches counted where some are hidden."""
    samples, counted = [], []
    for n in numbers:
        generator = torch.Generator().manual_seed(1000 + n)
        samples.append(torch.randn(fields.frames, *fields.shape[1:], fields.channels, generator=generator, dtype=torch.float64))
        some = torch.rand(fields.tokens, generator=generator) < 0.5
        counted.append(some & (n >= 0) if fields.objective == "masked" else torch.full_like(some, n >= 0))
    targets = torch.stack(counted).to(torch.int64) - 1
    valid, text = int((targets >= 0).sum()), None
    if fields.text_len is not None and fields.text_vocab_size is not None:
        text = _texts(numbers, fields.text_len, fields.text_vocab_size)
    return Batch(torch.stack(samples).to(dtype), targets, None, None, torch.tensor(numbers), valid, text)
