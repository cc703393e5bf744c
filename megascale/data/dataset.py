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
from megascale.data.history import Segment, Unit, continue_plan
from megascale.data.indexed import TokenFile
from megascale.data.memory import PLACE, TokenLists
from megascale.data.order import MixPlan, Unseen, permute, plan_mixture
from megascale.data.split import split_source
from megascale.data.stream import Documents, Tokens, TokenStream
from megascale.errors import UsageError

GROUP = 64  # chunks whose windows are shuffled together, where sequence lengths vary


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
        chunk: int | None = None,
    ) -> None:
        """`part`: "train" or "valid" of a split by `valid_fraction`, or "all" documents; `shuffled` False keeps the file order; `chunk` as
        in `data.chunk`: epochs go through pieces of that many tokens, whatever the length of a sample.

        Raises UsageError for token files that are missing, damaged, too short for one sample or made for another vocabulary, and for
        sources made with different tokenizers.
        """
        self.seq_len, self.seed, self.vocab_size, self.shuffled = seq_len, seed, vocab_size, shuffled
        self.unit = Unit(seq_len, chunk)
        longest = max(seq_len, chunk or 0)
        self.sources, self.streams = sources, []
        self.cut: list[str] = []  # sources from which no whole documents could be held out
        for source in sources:
            file = source.open()
            check_source(source, vocab_size)
            split = split_source(file.lengths, valid_fraction, longest + 1)
            chosen = split.part(part)
            stream = TokenStream(file, chosen.documents, chosen.first, chosen.end)
            if len(stream) < longest + 1:
                where = "" if part == "all" else f" in all, {len(stream)} of them in its {part} part"
                parts = "" if part == "all" else f" in each of the two parts that data.valid_fraction {valid_fraction} asks for"
                raise UsageError(
                    f"{source.path} has {int(file.lengths.sum(dtype=np.int64))} tokens{where}, and one sample of train.seq_len {longest} "
                    f"needs {longest + 1}{parts}: add data, or shorten train.seq_len"
                )
            self.streams.append(stream)
            if split.by_tokens:
                self.cut.append(f"{source.path} ({len(file)} documents, {len(stream)} tokens in its {part} part)")
        check_tokenizers(sources)
        self.plan: MixPlan = plan_mixture([s.weight for s in sources], [s.name for s in sources], seed)
        self.continued([])

    def note(self) -> str | None:
        """A note on how the held-out part was chosen, if not by whole documents."""
        if not self.cut:
            return None
        return f"too few documents to hold whole ones out, so the last tokens are held out (data.valid_fraction): {', '.join(self.cut)}"

    def continued(self, past: Sequence[Segment]) -> None:
        """Continues every source where the segments `past` left it."""
        self.plan = continue_plan(self.plan, [s.name for s in self.sources], past, self.unit, self._in_unit)

    def windows(self, unit: Unit, which: int) -> int:
        """Samples of an epoch of a source."""
        places = len(self.streams[which]) - 1
        return places // unit.seq_len if unit.chunk is None else places // unit.chunk * (unit.chunk // unit.seq_len)

    def sample(self, number: int) -> tuple[Tokens, NDArray[np.int32]]:
        """Tokens [seq_len+1] and document numbers [seq_len+1] of sample `number`."""
        which, index = self.plan.locate(number)
        stream, name = self.streams[which], self.sources[which].name
        windows = self.windows(self.unit, which)
        epoch, window = divmod(index, windows)
        if self.unit.chunk is not None:
            first = self._in_chunk(which, epoch, window)
        else:
            first = (permute(window, windows, self.seed, name, epoch) if self.shuffled else window) * self.seq_len
        tokens, documents = stream.read(first, self.seq_len + 1)
        check_tokens(tokens, self.sources[which], self.vocab_size)
        return tokens, documents

    def _in_chunk(self, which: int, epoch: int, window: int) -> int:
        """The first token of a window. The epoch shuffles chunks, and groups of `GROUP` chunks shuffle their windows."""
        assert self.unit.chunk is not None
        name, each = self.sources[which].name, self.unit.chunk // self.seq_len
        chunks = (len(self.streams[which]) - 1) // self.unit.chunk
        group, place = divmod(window, GROUP * each)
        if self.shuffled:
            size = min(GROUP, chunks - group * GROUP) * each
            place = permute(place, size, self.seed, name, epoch, "group", group, each)
        number, part = divmod(place, each)
        number += group * GROUP
        if self.shuffled:
            number = permute(number, chunks, self.seed, name, epoch)
        return number * self.unit.chunk + part * self.seq_len

    def _in_unit(self, name: str, unseen: Unseen, then: Unit, now: Unit) -> Unseen:
        """What is left of a source, in windows of another length: from the next group of chunks on if both cut the same chunks, else from
        the next epoch on.
        """
        which = [s.name for s in self.sources].index(name)
        before, after = self.windows(then, which), self.windows(now, which)
        epoch, window = divmod(unseen.end, before)
        if then.chunk is None or then.chunk != now.chunk:
            return Unseen(unseen.single[:0], (epoch + (window > 0)) * after)
        groups = -(-window // (GROUP * (then.chunk // then.seq_len)))
        return Unseen(unseen.single[:0], epoch * after + min(after, groups * GROUP * (then.chunk // now.seq_len)))


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
