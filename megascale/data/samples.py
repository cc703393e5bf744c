"""The samples of a config: vocabulary, the files of `data`, and the micro-batches of a step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megascale.comm.mesh import Mesh
from megascale.config.rules.pairs import spans_asked, spans_in
from megascale.config.schema import Config
from megascale.data.dataset import Corpus, Mixture, check_tokenizers, read_sources
from megascale.data.fields import FieldMixture
from megascale.data.fingerprint import Print, print_of
from megascale.data.history import Segment, Unit, closed, read_segments
from megascale.data.loader import Batch, make_batch, sample_numbers
from megascale.data.masking import Masking
from megascale.data.megatron_order import MegatronMixture
from megascale.data.memory import TokenLists
from megascale.data.pairs import SIDES, PairMixture, SpanMixture, side_of
from megascale.data.spans import Corruption
from megascale.data.vocabulary import end_token, extra_pieces, start_token, translates
from megascale.errors import UsageError

Samples = Mixture | MegatronMixture | FieldMixture | PairMixture | SpanMixture


def open_data(config: Config, lists: TokenLists | None = None) -> tuple[Samples, dict[str, Samples]]:
    """The training mixture and the named validation sets. `lists`: samples in memory, used if data.train is PLACE."""
    data, train = config.data, config.train
    sources = train_sources(config, lists)
    part = "train" if data.valid_fraction > 0 else "all"
    samples = open_samples(config, sources, part, True)
    if not train.eval_every:
        return samples, {}
    if data.valid is not None:
        held, part = read_sources(data.valid, "data.valid"), "all"
    else:
        held, part = sources, "valid"
    for side in SIDES if translates(config) else ("",):
        check_tokenizers([side_of(s, side) if side else s for s in (*sources, *held)])
    return samples, {s.name: open_samples(config, [s], part, False) for s in held}


def train_sources(config: Config, lists: TokenLists | None = None) -> list[Corpus]:
    """The sources of data.train. Raises UsageError for lists in memory if the model's samples are not documents of tokens."""
    sources = read_sources(config.data.train, "data.train")
    if lists is None:
        return sources
    if config.model.spacetime is not None or translates(config):
        what = "fields" if config.model.spacetime is not None else "pairs of texts"
        raise UsageError(
            f"model.family is {config.model.family}, which trains on {what}, but samples in memory are documents: name files in data.train"
        )
    return [replace(source, lists=lists) for source in sources]


def prints_of(config: Config, lists: TokenLists | None = None) -> dict[str, dict[str, Print]]:
    """{"train": {source: fingerprint}, "valid": …} of the data to read; `valid` is empty if it is held out of train."""
    train = train_sources(config, lists)
    asked = config.data.valid if config.train.eval_every else None
    valid = [] if asked is None else read_sources(asked, "data.valid")
    fields = config.model.spacetime
    ends = ["bin", "idx"]
    if translates(config):
        ends = [f"{side}.{end}" for side in SIDES for end in ends]
    elif fields is not None:
        ends = ["npy", *(f"text.{end}" for end in ends if fields.text_len)]

    def each(sources: list[Corpus]) -> dict[str, Print]:
        return {s.name: _print(s, ends, fields is not None) for s in sources}

    return {"train": each(train), "valid": each(valid)}


def _print(source: Corpus, ends: Sequence[str], fields: bool) -> Print:
    return print_of(source.path, ends, fields) if source.lists is None else {"documents": source.lists.fingerprint}


def overlap_note(prints: Mapping[str, Mapping[str, Print]]) -> str | None:
    """A warning if the model is trained on a validation set."""
    known = {json.dumps(found, sort_keys=True): name for name, found in prints["train"].items()}
    both = [(name, known[text]) for name, found in prints["valid"].items() if (text := json.dumps(found, sort_keys=True)) in known]
    if not both:
        return None
    names = ", ".join(f"{valid} is {train}" if valid != train else valid for valid, train in both)
    return (
        f"data.valid has the same files as data.train ({names}), so valid_loss measures data that the model is trained on: name others, or "
        "leave data.valid out and hold some out with data.valid_fraction"
    )


def open_samples(config: Config, sources: list[Corpus], part: str, shuffled: bool) -> Samples:
    """`part` and `shuffled` as in `Mixture`."""
    model, seed, t, fraction = config.model, config.run.seed, config.train, config.data.valid_fraction
    if model.spacetime is not None:
        return FieldMixture(sources, model.spacetime, seed, part, fraction, shuffled)
    assert model.vocab_size is not None
    lengths, vocab = (t.source_length, t.seq_len), model.vocab_size - extra_pieces(config)
    if translates(config):
        sizes = (vocab if model.share_embeddings else model.source_vocab_size or vocab, vocab)
        return PairMixture(sources, lengths, seed, sizes, start_token(config), part, fraction, shuffled)
    if spans_asked(config):
        spans = spans_in(config)
        assert spans is not None
        text = Mixture(sources, spans.tokens, seed, vocab, part, fraction, shuffled)
        marks_end = model.vocab_size if config.data.mark_token is None else config.data.mark_token + 1
        return SpanMixture(text, Corruption(seed, spans, marks_end, end_token(config)), lengths, start_token(config))
    if config.data.order == "megatron":
        steps = t.total_steps if shuffled else t.eval_steps
        return MegatronMixture(sources, t.seq_len, seed, vocab, part, fraction, steps * t.global_batch_size)
    return Mixture(sources, t.seq_len, seed, vocab, part, fraction, shuffled, config.data.chunk)


def drawn_so(samples: Samples, end: int) -> Segment:
    """How a run draws from `samples`, as the segment that would end before sample `end`."""
    text = samples.text if isinstance(samples, SpanMixture) else samples
    unit = text.unit if isinstance(text, Mixture) else Unit(0)  # others number whole documents
    return Segment(end, {s.name: s.weight for s in text.sources}, *unit)


def drawn_before(samples: Samples, saved: Mapping[str, Any]) -> list[Segment]:
    """The finished segments of a run that goes on with `samples`. `saved`: its trainer.json. Raises UsageError."""
    past = read_segments(saved.get("drawn") or [], "trainer.json")
    now = drawn_so(samples, saved["samples"])
    if (mixture := saved.get("mixture")) is not None:
        then = read_segments([{**mixture, "end": now.end}], "trainer.json")[0]
    elif sources := saved.get("sources"):  # before version 4 of it there was one segment
        then = replace(now, weights={name: weight for name, _, weight in sources}, chunk=None)
    else:
        then = now
    return closed(past, then, now)


def continue_samples(samples: Samples, past: Sequence[Segment]) -> None:
    """Continues every source where the segments `past` left it; megatron's order has only one segment."""
    if not isinstance(samples, MegatronMixture):
        samples.continued(past)


def note(samples: Samples) -> str | None:
    """A note about the samples for the screen, if there is one."""
    return samples.note() if isinstance(samples, PairMixture | Mixture) else None


def valid_notes(config: Config, valid: Mapping[str, Samples]) -> list[str]:
    """A warning per validation set that has fewer samples than an evaluation takes, which then weighs samples unequally."""
    batch, steps = config.train.global_batch_size, config.train.eval_steps
    notes, asked = [], batch * steps
    for name, samples in valid.items():
        there = own_samples(samples)
        if there is None or there >= asked:
            continue
        times, more = divmod(asked, there)
        how_often = f"{more} of them count {_times(times + 1)} and the rest {_times(times)}" if more else f"each counts {_times(times)}"
        fix = f"train.eval_steps={there // batch} counts none twice" if there >= batch else "a larger set is needed, or a smaller batch"
        notes.append(
            f"the validation set {name} has {there} samples, but an evaluation takes {asked} (train.eval_steps {steps} × "
            f"train.global_batch_size {batch}): {how_often}; {fix}"
        )
    return notes


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def own_samples(samples: Samples) -> int | None:
    """The number of different samples; None for an order that was drawn for the number needed."""
    if isinstance(samples, SpanMixture):
        samples = samples.text
    if isinstance(samples, Mixture):
        return sum((len(stream) - 1) // samples.seq_len for stream in samples.streams)
    return None if isinstance(samples, MegatronMixture) else sum(map(len, samples.files))


def masking_of(config: Config, vocabulary: int) -> Masking:
    """The masking of an encoder's samples; `vocabulary` does not count an extra mask token."""
    mask = config.data.mask_token
    return Masking(config.run.seed, config.data.masked, vocabulary if mask is None else mask, vocabulary)


def document_lengths(config: Config, samples: Samples, count: int = 32) -> list[int]:
    """Tokens per document segment in the first `count` samples; empty if attention may cross documents."""
    found: list[int] = []
    if config.train.packing == "documents" and isinstance(samples, Mixture | MegatronMixture):
        for number in range(count):
            documents = samples.sample(number)[1][:-1]
            begins = np.flatnonzero(np.concatenate(([True], documents[1:] != documents[:-1], [True])))
            found += np.diff(begins).tolist()
    return found


def micro_batches(config: Config, samples: Samples, first: int, mesh: Mesh, device: torch.device) -> list[Batch]:
    """This rank's micro-batches of the global batch that starts at sample `first`."""
    t = config.train
    rows = sample_numbers(first, t.global_batch_size, t.micro_batch_size, mesh.data_rank, mesh.data_size)
    if not isinstance(samples, Mixture | MegatronMixture):
        return [samples.batch(row, device) for row in rows]
    masking = None
    if config.model.family == "encoder":
        masking = masking_of(config, samples.vocab_size)
    return [make_batch(samples, row, t.packing, device, masking) for row in rows]
