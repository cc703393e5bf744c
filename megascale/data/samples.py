"""What a config's samples are: the vocabulary, the files behind `data`, and the micro-batches of a step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megascale.comm.mesh import Mesh
from megascale.config.rules.pairs import spans_asked, spans_in
from megascale.config.schema import Config, Spacetime
from megascale.config.spans import SENTINELS
from megascale.data.dataset import Mixture, Source, check_tokenizers, read_sources
from megascale.data.facts import source_facts
from megascale.data.fields import FieldMixture
from megascale.data.fingerprint import Print, print_of
from megascale.data.indexed import TokenFile
from megascale.data.loader import Batch, make_batch, sample_numbers
from megascale.data.masking import Masking
from megascale.data.megatron_order import MegatronMixture
from megascale.data.pairs import SIDES, PairMixture, SpanMixture, side_of
from megascale.data.spans import Corruption
from megascale.data.tokenizer import beside, load_tokenizer
from megascale.errors import UsageError

Samples = Mixture | MegatronMixture | FieldMixture | PairMixture | SpanMixture


def translates(config: Config) -> bool:
    """Whether prefixes are of pairs: PREFIX.source and PREFIX.target."""
    return config.model.family == "encoder_decoder" and not spans_asked(config)


def extra_pieces(config: Config) -> int:
    """Pieces of the vocabulary, its last ones, that no file holds: an encoder's mask and the marks of spans, unless they are the
    tokenizer's.
    """
    if spans_asked(config):
        return SENTINELS if config.data.mark_token is None else 0
    return int(config.model.family == "encoder" and config.data.mask_token is None)


def first_prefix(config: Config, side: str = "target") -> str:
    """Of the first training source; with translation of one of its sides."""
    source = read_sources(config.data.train, "data.train")[0]
    return side_of(source, side).path if translates(config) else source.path


def first_facts(config: Config) -> dict[str, Any]:
    """What is known of the tokens that are predicted."""
    return source_facts(first_prefix(config))


def resolve_vocabulary(config: Config) -> Config:
    """`model.vocab_size` from the tokenizer where the config leaves it open; a tokenizer larger than the vocabulary is refused. Sources
    with a table of their own have a vocabulary of their own. Fields have none.
    """
    model, data = config.model, config.data
    if model.spacetime is not None:
        return config.model_copy(update={"model": model.model_copy(update={"spacetime": with_text(config, model.spacetime)})})
    size = vocabulary(first_prefix(config), model.vocab_size, data.tokenizer, "", extra_pieces(config))
    for key, token in (("mask_token", data.mask_token), ("start_token", data.start_token), ("mark_token", data.mark_token)):
        if token is not None and token >= size:
            raise UsageError(f"data.{key} is {token} and the vocabulary has {size} pieces, counted from 0: choose one of them")
    if data.mark_token is not None and data.mark_token < SENTINELS:
        raise UsageError(
            f"data.mark_token is {data.mark_token}, and {SENTINELS} marks from it down leave no piece for text: choose a later"
        )
    found = {"vocab_size": size}
    if translates(config) and not model.share_embeddings:
        prefix = first_prefix(config, "source")
        found["source_vocab_size"] = vocabulary(prefix, model.source_vocab_size, data.source_tokenizer, "source_", 0)
    return config.model_copy(update={"model": model.model_copy(update=found)})


def with_text(config: Config, fields: Spacetime) -> Spacetime:
    """The fields with the vocabulary of their texts, where they have any."""
    if not fields.text_len:
        return fields
    prefix = read_sources(config.data.train, "data.train")[0].path + ".text"
    return fields.model_copy(
        update={"text_vocab_size": vocabulary(prefix, fields.text_vocab_size, config.data.tokenizer, "spacetime.text_", 0)}
    )


def vocabulary(prefix: str, wanted: int | None, tokenizer: str | None, side: str, more: int) -> int:
    """The size of the vocabulary of the token files `prefix`: as `wanted`, else from the `tokenizer` (the one beside the files if absent),
    with `more` pieces for what no file holds. `side` is how its keys' names begin.
    """
    path = tokenizer or beside(prefix)
    if path is None:
        known = source_facts(prefix).get("vocab_size")
        size = wanted or (known and known + more)
        if size is None:
            TokenFile(prefix)  # a wrong path is the likelier mistake, and named first
            raise UsageError(
                f"model.{side}vocab_size is absent and no tokenizer lies beside {prefix}: set one of model.{side}vocab_size and "
                f"data.{side}tokenizer"
            )
        return int(size)
    pieces = load_tokenizer(path)
    size = wanted or pieces.vocab_size + more
    if size < pieces.vocab_size + more:
        why = {0: "", 1: " and an encoder needs one more for its mask"}.get(more, f" and span corruption needs {more} more for its marks")
        raise UsageError(
            f"model.{side}vocab_size is {size} and the tokenizer {path} has {pieces.vocab_size} pieces{why}: leave {side}vocab_size out to "
            "take them"
        )
    made_with = source_facts(prefix).get("tokenizer_fingerprint")
    if made_with is not None and made_with != pieces.fingerprint:
        raise UsageError(
            f"{prefix} was made with tokenizer {made_with} and data.{side}tokenizer {path} is {pieces.fingerprint}: they number words "
            "differently; use the tokenizer beside the data"
        )
    return size


def end_token(config: Config) -> int:
    """The piece that ends a text."""
    prefix = first_prefix(config)
    known = source_facts(prefix).get("eos_id")
    if known is not None:
        if config.model.vocab_size is not None and known >= config.model.vocab_size:
            raise UsageError(f"{prefix}.json: eos_id is {known}, and model.vocab_size is {config.model.vocab_size}: prepare the data again")
        return int(known)
    path = config.data.tokenizer or beside(prefix)
    if path is None:
        raise UsageError(f"nothing beside {prefix} says which token ends a text: set data.tokenizer, or prepare the data again")
    return load_tokenizer(path).eos_id


def start_token(config: Config) -> int:
    """The piece that a decoder which has read a source begins with."""
    return end_token(config) if config.data.start_token is None else config.data.start_token


def open_data(config: Config) -> tuple[Samples, dict[str, Samples]]:
    """The training mixture and the named validation sets."""
    data, train = config.data, config.train
    sources = read_sources(data.train, "data.train")
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


def prints_of(config: Config) -> dict[str, dict[str, Print]]:
    """{"train": {source: fingerprint}, "valid": …} of the data that are read; `valid` is empty where it is held out of train."""
    train = read_sources(config.data.train, "data.train")
    asked = config.data.valid if config.train.eval_every else None
    valid = [] if asked is None else read_sources(asked, "data.valid")
    fields = config.model.spacetime
    ends = ["bin", "idx"]
    if translates(config):
        ends = [f"{side}.{end}" for side in SIDES for end in ends]
    elif fields is not None:
        ends = ["npy", *(f"text.{end}" for end in ends if fields.text_len)]

    def each(sources: list[Source]) -> dict[str, Print]:
        return {s.name: print_of(s.path, ends, fields is not None) for s in sources}

    return {"train": each(train), "valid": each(valid)}


def overlap_note(prints: Mapping[str, Mapping[str, Print]]) -> str | None:
    """A sentence where sets for validation are trained on."""
    known = {json.dumps(found, sort_keys=True): name for name, found in prints["train"].items()}
    both = [(name, known[text]) for name, found in prints["valid"].items() if (text := json.dumps(found, sort_keys=True)) in known]
    if not both:
        return None
    names = ", ".join(f"{valid} is {train}" if valid != train else valid for valid, train in both)
    return (
        f"data.valid has the same files as data.train ({names}), so valid_loss is of data that the model is trained on: name others, or "
        "leave data.valid out and hold some out with data.valid_fraction"
    )


def open_samples(config: Config, sources: list[Source], part: str, shuffled: bool) -> Samples:
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
    return Mixture(sources, t.seq_len, seed, vocab, part, fraction, shuffled)


def note(samples: Samples) -> str | None:
    """What a reader of the screen should know of the samples."""
    return samples.note() if isinstance(samples, PairMixture | Mixture) else None


def valid_notes(config: Config, valid: Mapping[str, Samples]) -> list[str]:
    """A sentence for every validation set that is smaller than what an evaluation asks for: its numbers then weigh samples unequally."""
    batch, steps = config.train.global_batch_size, config.train.eval_steps
    notes, asked = [], batch * steps
    for name, samples in valid.items():
        there = own_samples(samples)
        if there is None or there >= asked:
            continue
        times, more = divmod(asked, there)
        how_often = f"{more} of them count {_times(times + 1)} and the others {_times(times)}" if more else f"each counts {_times(times)}"
        fix = f"train.eval_steps={there // batch} counts none twice" if there >= batch else "a larger set is needed, or a smaller batch"
        notes.append(
            f"the validation set {name} has {there} samples, and an evaluation takes {asked} (train.eval_steps {steps} × "
            f"train.global_batch_size {batch}): {how_often}; {fix}"
        )
    return notes


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def own_samples(samples: Samples) -> int | None:
    """How many different samples there are; None for an order that was drawn for as many as are asked for."""
    if isinstance(samples, SpanMixture):
        samples = samples.text
    if isinstance(samples, Mixture):
        return sum((len(stream) - 1) // samples.seq_len for stream in samples.streams)
    return None if isinstance(samples, MegatronMixture) else sum(map(len, samples.files))


def masking_of(config: Config, vocabulary: int) -> Masking:
    """How an encoder's samples, of a `vocabulary` without a mask that is no token, are masked."""
    mask = config.data.mask_token
    return Masking(config.run.seed, config.data.masked, vocabulary if mask is None else mask, vocabulary)


def document_lengths(config: Config, samples: Samples, count: int = 32) -> list[int]:
    """How many tokens of each document attention sees together, in the first `count` samples; nothing where it may cross documents."""
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
