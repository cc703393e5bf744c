"""Sources with their targets, for encoder–decoders: two aligned token files, or span corruption of one text.

A prefix of pairs is PREFIX.source and PREFIX.target, two prefixes of token files whose documents correspond by number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from megascale.data.dataset import Corpus, Mixture, check_source, check_tokenizers, check_tokens
from megascale.data.history import Segment, continue_plan
from megascale.data.indexed import TokenFile
from megascale.data.loader import NOT_COUNTED, Batch, to_device
from megascale.data.order import MixPlan, permute, plan_mixture, split_documents
from megascale.data.spans import Corruption
from megascale.errors import UsageError

SIDES = ("source", "target")
Tokens = NDArray[np.int64]


def side_of(source: Corpus, side: str) -> Corpus:
    """The token files of one side of a prefix of pairs."""
    return Corpus(f"{source.path}.{side}", source.weight, source.name)


class PairFile:
    """The pairs of one prefix to use: `part` as in `Mixture`, with both sides short enough. Nothing is truncated, since half a sentence is
    not the translation of a whole one: `left_out` counts the pairs that were too long.
    """

    def __init__(self, source: Corpus, lengths: tuple[int, int], vocab_sizes: tuple[int, int], part: str, valid_fraction: float) -> None:
        sides = [side_of(source, side) for side in SIDES]
        self.files = [TokenFile(s.path) for s in sides]
        self.sides, self.vocab_sizes = sides, vocab_sizes
        counts = [len(f) for f in self.files]
        if counts[0] != counts[1]:
            raise UsageError(
                f"{sides[0].path} has {counts[0]} documents and {sides[1].path} has {counts[1]}: sources and targets belong together by "
                "number; prepare both in one run with megascale prepare --pairs"
            )
        for side, size in zip(sides, vocab_sizes):
            check_source(side, size)
        train, valid = split_documents(counts[0], valid_fraction)
        numbers: NDArray[np.int64] = {"train": train, "valid": valid, "all": np.arange(counts[0])}[part]
        fits = [(f.lengths[numbers] <= n) & (f.lengths[numbers] > 0) for f, n in zip(self.files, lengths)]
        self.numbers = numbers[fits[0] & fits[1]]
        self.left_out = len(numbers) - len(self.numbers)
        if not len(self.numbers):
            raise UsageError(
                f"{source.path} has {len(numbers)} pairs in its {part} part but none fits into train.source_len {lengths[0]} and "
                f"train.seq_len {lengths[1]}: add data, or choose longer ones"
            )

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int) -> tuple[Tokens, Tokens]:
        number = int(self.numbers[index])
        source, target = (f.read(number).astype(np.int64) for f in self.files)
        for side, tokens, size in zip(self.sides, (source, target), self.vocab_sizes):
            check_tokens(tokens, side, size)
        return source, target


class PairMixture:
    """Pairs for sample numbers n ≥ 0, from one or several prefixes, reshuffled every epoch."""

    def __init__(
        self,
        sources: list[Corpus],
        lengths: tuple[int, int],
        seed: int,
        vocab_sizes: tuple[int, int],
        start: int,
        part: str,
        valid_fraction: float,
        shuffled: bool,
    ) -> None:
        """`lengths` and `vocab_sizes` are (source, target); the decoder's input begins with the token `start`."""
        for side in SIDES:
            check_tokenizers([side_of(s, side) for s in sources])
        self.sources, self.lengths, self.seed, self.start, self.shuffled = sources, lengths, seed, start, shuffled
        self.files = [PairFile(s, lengths, vocab_sizes, part, valid_fraction) for s in sources]
        self.plan: MixPlan = plan_mixture([s.weight for s in sources], [s.name for s in sources], seed)

    def continued(self, past: Sequence[Segment]) -> None:
        """Continues every source where the segments `past` left it."""
        self.plan = continue_plan(self.plan, [s.name for s in self.sources], past)

    def pair(self, number: int) -> tuple[Tokens, Tokens]:
        """Source and target of sample `number`, as stored in the files."""
        which, index = self.plan.locate(number)
        file = self.files[which]
        epoch, index = divmod(index, len(file))
        if self.shuffled:
            index = permute(index, len(file), self.seed, self.sources[which].name, epoch)
        return file.read(index)

    def batch(self, numbers: list[int], device: torch.device) -> Batch:
        pairs = [None if n == NOT_COUNTED else self.pair(n) for n in numbers]
        return pair_batch(pairs, numbers, self.lengths, self.start, device)

    def note(self) -> str | None:
        """A note about the pairs that were left out."""
        left, all_ = sum(f.left_out for f in self.files), sum(f.left_out + len(f) for f in self.files)
        if not left:
            return None
        where = f"train.source_len {self.lengths[0]} and train.seq_len {self.lengths[1]}"
        return f"{left} of {all_} pairs are empty or do not fit into {where}: left out"


class SpanMixture:
    """Pairs for sample numbers n ≥ 0, made by `corruption` of windows of `text`; the decoder's input begins with the token `start`."""

    def __init__(self, text: Mixture, corruption: Corruption, lengths: tuple[int, int], start: int) -> None:
        self.text, self.corruption, self.lengths, self.start = text, corruption, lengths, start

    def continued(self, past: Sequence[Segment]) -> None:
        self.text.continued(past)

    def pair(self, number: int) -> tuple[Tokens, Tokens]:
        return self.corruption.corrupt(self.text.sample(number)[0][: self.corruption.sizes.tokens], number)

    def batch(self, numbers: list[int], device: torch.device) -> Batch:
        pairs = [None if n == NOT_COUNTED else self.pair(n) for n in numbers]
        return pair_batch(pairs, numbers, self.lengths, self.start, device)


def pair_batch(
    pairs: Sequence[tuple[Tokens, Tokens] | None], numbers: list[int], lengths: tuple[int, int], start: int, device: torch.device
) -> Batch:
    """Pairs in rows of fixed length; None leaves a row empty. The decoder's input is `start`, then the target shifted by one, so that it
    predicts each token from the ones before.
    """
    source = np.full((len(pairs), lengths[0]), NOT_COUNTED, np.int64)
    tokens = np.zeros((len(pairs), lengths[1]), np.int64)
    targets = np.full((len(pairs), lengths[1]), NOT_COUNTED, np.int64)
    for row, pair in enumerate(pairs):
        if pair is not None:
            read, written = pair
            source[row, : len(read)] = read
            tokens[row, : len(written)] = np.concatenate(([start], written[:-1]))
            targets[row, : len(written)] = written
    samples = to_device(np.array(numbers, np.int64), device)
    valid = int((targets >= 0).sum())
    return Batch(to_device(tokens, device), to_device(targets, device), None, None, samples, valid, to_device(source, device))
