"""The vocabulary of a config's data: its size, and the tokens that end a document or begin a translation."""

from __future__ import annotations

from typing import Any

from megascale.config.rules.pairs import spans_asked
from megascale.config.schema import Config, Spacetime
from megascale.config.spans import SENTINELS
from megascale.data.dataset import read_sources
from megascale.data.facts import source_facts
from megascale.data.indexed import TokenFile
from megascale.data.memory import PLACE
from megascale.data.pairs import side_of
from megascale.data.tokenizer import beside, load_tokenizer
from megascale.errors import UsageError


def translates(config: Config) -> bool:
    """Whether a prefix names pairs: PREFIX.source and PREFIX.target."""
    return config.model.family == "encoder_decoder" and not spans_asked(config)


def extra_pieces(config: Config) -> int:
    """Number of tokens at the end of the vocabulary that no file holds: an encoder's mask and the span marks, unless they are among the
    tokenizer's.
    """
    if spans_asked(config):
        return SENTINELS if config.data.mark_token is None else 0
    return int(config.model.family == "encoder" and config.data.mask_token is None)


def first_prefix(config: Config, side: str = "target") -> str:
    """The prefix of the first training source; under translation, of one of its sides."""
    source = read_sources(config.data.train, "data.train")[0]
    return side_of(source, side).path if translates(config) else source.path


def first_facts(config: Config) -> dict[str, Any]:
    """The facts about the tokens that are predicted."""
    return source_facts(first_prefix(config))


def resolve_vocabulary(config: Config) -> Config:
    """Sets `model.vocab_size` from the tokenizer if absent; refuses a tokenizer larger than the vocabulary. Sources with their own table
    have their own vocabulary. Fields have none.
    """
    model, data = config.model, config.data
    if model.spacetime is not None:
        return config.model_copy(update={"model": model.model_copy(update={"spacetime": with_text(config, model.spacetime)})})
    size = vocabulary(first_prefix(config), model.vocab_size, data.tokenizer, "", extra_pieces(config))
    for key, token in (("mask_token", data.mask_token), ("start_token", data.start_token), ("mark_token", data.mark_token)):
        if token is not None and token >= size:
            raise UsageError(f"data.{key} is {token} but the vocabulary has {size} pieces, counted from 0: choose one of them")
    if data.mark_token is not None and data.mark_token < SENTINELS:
        raise UsageError(
            f"data.mark_token is {data.mark_token}, but {SENTINELS} marks from it down leave no token for text: choose a later"
        )
    found = {"vocab_size": size}
    if translates(config) and not model.share_embeddings:
        prefix = first_prefix(config, "source")
        found["source_vocab_size"] = vocabulary(prefix, model.source_vocab_size, data.source_tokenizer, "source_", 0)
    return config.model_copy(update={"model": model.model_copy(update=found)})


def with_text(config: Config, fields: Spacetime) -> Spacetime:
    """The fields with the vocabulary of their texts, if they have any."""
    if not fields.text_len:
        return fields
    prefix = read_sources(config.data.train, "data.train")[0].path + ".text"
    return fields.model_copy(
        update={"text_vocab_size": vocabulary(prefix, fields.text_vocab_size, config.data.tokenizer, "spacetime.text_", 0)}
    )


def vocabulary(prefix: str, wanted: int | None, tokenizer: str | None, side: str, more: int) -> int:
    """The vocabulary size of the token files `prefix`: `wanted`, else from the `tokenizer` (default: the one next to the files), with
    `more` tokens that no file holds. `side` is the prefix of its keys' names.
    """
    path = tokenizer or beside(prefix)
    if path is None:
        known = source_facts(prefix).get("vocab_size")
        size = wanted or (known and known + more)
        if size is None and prefix == PLACE:
            raise UsageError("model.vocab_size is absent, and samples in memory have no tokenizer: set model.vocab_size or data.tokenizer")
        if size is None:
            TokenFile(prefix)  # a wrong path is the likelier mistake, so report it first
            raise UsageError(
                f"model.{side}vocab_size is absent and there is no tokenizer next to {prefix}: set one of model.{side}vocab_size and "
                f"data.{side}tokenizer"
            )
        return int(size)
    pieces = load_tokenizer(path)
    size = wanted or pieces.vocab_size + more
    if size < pieces.vocab_size + more:
        why = {0: "", 1: " and an encoder needs one more for its mask"}.get(more, f" and span corruption needs {more} more for its marks")
        raise UsageError(
            f"model.{side}vocab_size is {size} but the tokenizer {path} has {pieces.vocab_size} pieces{why}: leave {side}vocab_size out to "
            "take them"
        )
    made_with = source_facts(prefix).get("tokenizer_fingerprint")
    if made_with is not None and made_with != pieces.fingerprint:
        raise UsageError(
            f"{prefix} was made with tokenizer {made_with} and data.{side}tokenizer {path} is {pieces.fingerprint}: they number words "
            "differently; use the data's tokenizer"
        )
    return size


def end_token(config: Config) -> int:
    """The token that ends a text."""
    prefix = first_prefix(config)
    known = source_facts(prefix).get("eos_id")
    if known is not None:
        if config.model.vocab_size is not None and known >= config.model.vocab_size:
            raise UsageError(f"{prefix}.json: eos_id is {known}, but model.vocab_size is {config.model.vocab_size}: prepare the data again")
        return int(known)
    path = config.data.tokenizer or beside(prefix)
    if path is None:
        raise UsageError(f"no file of {prefix} says which token ends a text: set data.tokenizer, or prepare the data again")
    return load_tokenizer(path).eos_id


def start_token(config: Config) -> int:
    """The token with which an encoder-decoder's target begins."""
    return end_token(config) if config.data.start_token is None else config.data.start_token
