"""Sources → one endless sequence of samples; each depends only on (seed, number)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascale.config.load import read_yaml
from megascale.config.schema import DataSource
from megascale.data.facts import source_facts
from megascale.data.indexed import TokenFile
from megascale.data.memory import PLACE, TokenLists
from megascale.data.order import MixPlan, permute, plan_mixture
from megascale.data.split import split_source
from megascale.data.stream import Documents, Tokens, TokenStream
from megascale.errors import UsageError


@dataclass(frozen=True)
class Corpus:
    """One prefix of token files, its weight in the mixture and its name in logs; or `lists` in memory instead of files."""

    path: str
    weight: float
    name: str
    lists: TokenLists | None = field(default=None, compare=False)

    def open(self) -> Documents:
        """Raises UsageError."""
        if self.lists is None and self.path == PLACE:
            raise UsageError(
                f"data.train is {PLACE}, which stands for samples in memory, and none are given: train with "
                "megascale.training(config, samples=…), or set data.train to a prefix of token files"
            )
        return TokenFile(self.path) if self.lists is None else self.lists


def read_sources(value: str | Sequence[DataSource | str], key: str) -> list[Corpus]:
    """The config's `data.train` or `data.valid`: a prefix, a list, or a YAML file with a list `sources` and paths relative to it."""
    if isinstance(value, str) and value.endswith((".yaml", ".yml")):
        path = Path(value)
        entries = read_yaml(path).get("sources")
        if not isinstance(entries, list) or not entries:
            raise UsageError(f"{key}: {path} needs a list `sources` of {{path, weight, name}}")
        items = [_entry(e, f"{path}: sources[{i}]") for i, e in enumerate(entries)]
        items = [DataSource(path=str(path.parent / s.path), weight=s.weight, name=s.name) for s in items]
    else:
        listed = [value] if isinstance(value, str) else list(value)
        items = [e if isinstance(e, DataSource) else DataSource(path=e) for e in listed]
    if not items:
        raise UsageError(f"{key} is an empty list: name at least one prefix of token files")
    sources = [Corpus(s.path, s.weight, s.name or Path(s.path).name) for s in items]
    names = [s.name for s in sources]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise UsageError(f"{key}: the name {sorted(twice)[0]} is used twice; give each source a different `name`")
    return sources


def _entry(value: Any, where: str) -> DataSource:
    try:
        return DataSource(path=value) if isinstance(value, str) else DataSource.model_validate(value)
    except ValueError:
        raise UsageError(f"{where} is {value!r}: write a prefix or {{path, weight, name}}") from None


class Mixture:
    """`sample(n)` for any n ≥ 0: windows of seq_len+1 tokens, neighbours sharing one token, reshuffled every epoch."""

    def __init__(
        self,
        sources: list[Corpus],
        seq_len: int,
        seed: int,
        vocab_size: int,
        part: str,
        valid_fraction: float,
        shuffled: bool,
    ) -> None:
        """`part`: "train" or "valid" of a split by `valid_fraction`, or "all" documents; `shuffled` False keeps the file order.

        Raises UsageError for token files that are missing, damaged, too short for one sample or made for another vocabulary, and for
        sources made with different tokenizers.
        """
        self.seq_len, self.seed, self.vocab_size, self.shuffled = seq_len, seed, vocab_size, shuffled
        self.sources, self.streams = sources, []
        self.cut: list[str] = []  # sources from which no whole documents could be held out
        for source in sources:
            file = source.open()
            check_source(source, vocab_size)
            split = split_source(file.lengths, valid_fraction, seq_len + 1)
            chosen = split.part(part)
            stream = TokenStream(file, chosen.documents, chosen.first, chosen.end)
            if len(stream) < seq_len + 1:
                where = "" if part == "all" else f" in all, {len(stream)} of them in its {part} part"
                parts = "" if part == "all" else f" in each of the two parts that data.valid_fraction {valid_fraction} asks for"
                raise UsageError(
                    f"{source.path} has {int(file.lengths.sum(dtype=np.int64))} tokens{where}, and one sample of train.seq_len {seq_len} "
                    f"needs {seq_len + 1}{parts}: add data, or shorten train.seq_len"
                )
            self.streams.append(stream)
            if split.by_tokens:
                self.cut.append(f"{source.path} ({len(file)} documents, {len(stream)} tokens in its {part} part)")
        check_tokenizers(sources)
        self.plan: MixPlan = plan_mixture([s.weight for s in sources], [s.name for s in sources], seed)

    def note(self) -> str | None:
        """A note on how the held-out part was chosen, if not by whole documents."""
        if not self.cut:
            return None
        return f"too few documents to hold whole ones out, so the last tokens are held out (data.valid_fraction): {', '.join(self.cut)}"

    def sample(self, number: int) -> tuple[Tokens, NDArray[np.int32]]:
        """Tokens [seq_len+1] and document numbers [seq_len+1] of sample `number`."""
        which, index = self.plan.locate(number)
        stream, name = self.streams[which], self.sources[which].name
        windows = (len(stream) - 1) // self.seq_len
        epoch, window = divmod(index, windows)
        if self.shuffled:
            window = permute(window, windows, self.seed, name, epoch)
        tokens, documents = stream.read(window * self.seq_len, self.seq_len + 1)
        check_tokens(tokens, self.sources[which], self.vocab_size)
        return tokens, documents


def check_tokens(tokens: Tokens, source: Corpus, vocab_size: int, key: str = "model.vocab_size") -> None:
    """Raises UsageError for a token beyond the vocabulary."""
    smallest, largest = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    if smallest < 0:
        raise UsageError(f"{source.path} holds token {smallest}, but token ids start at 0: the file is damaged; make it again")
    if largest >= vocab_size:
        raise UsageError(
            f"{source.path} holds token {largest} but {key} is {vocab_size}: use the tokenizer that made the file, or a larger vocabulary"
        )


def check_source(source: Corpus, vocab_size: int) -> None:
    """Raises UsageError if a source was made with a larger vocabulary, or holds a token beyond this one."""
    if source.lists is not None and source.lists.largest >= vocab_size:
        raise UsageError(
            f"samples hold token {source.lists.largest}, but the vocabulary has {vocab_size} entries: set model.vocab_size to "
            f"{source.lists.largest + 1} or more"
        )
    used = source_facts(source.path).get("vocab_size")
    if used is not None and used > vocab_size:
        raise UsageError(
            f"{source.path} was made with a vocabulary of {used}, and model.vocab_size is {vocab_size}: leave model.vocab_size out to take "
            "the tokenizer's"
        )


def check_tokenizers(sources: list[Corpus]) -> None:
    """Raises UsageError if two sources were made with different tokenizers; files from other tools record none and pass."""
    made_with = [(s.path, source_facts(s.path).get("tokenizer_fingerprint")) for s in sources]
    known = [(path, mark) for path, mark in made_with if mark is not None]
    for path, mark in known[1:]:
        if mark != known[0][1]:
            raise UsageError(
                f"{known[0][0]} was made with tokenizer {known[0][1]} and {path} with {mark}: their token ids differ; prepare both "
                "with the same --tokenizer"
            )
