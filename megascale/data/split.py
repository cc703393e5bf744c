"""Splits a source into tokens to train on and tokens to hold out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megascale.data.order import split_documents


@dataclass(frozen=True)
class SplitPart:
    """Part of a token file: documents `documents` (None: all) end to end, and of that stream the tokens from `first` up to `end` (None: the
    end).
    """

    documents: NDArray[np.int64] | None = None
    first: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Split:
    """`by_tokens`: a document may be cut at the border, since no whole ones could be held out."""

    train: SplitPart
    valid: SplitPart
    by_tokens: bool = False

    def part(self, name: str) -> SplitPart:
        return {"train": self.train, "valid": self.valid, "all": SplitPart()}[name]


def split_source(lengths: NDArray[np.integer], fraction: float, sample: int) -> Split:
    """Splits documents of `lengths` tokens and holds out a `fraction`, for samples of `sample` tokens.

    Whole documents are held out (`split_documents`), so that training sees nothing of a held-out text. If a part would then have no sample,
    as with a corpus of one text file, the tail of the stream is held out instead: `fraction` of its tokens, and at least one sample. It is
    the tail rather than scattered samples, since neighbours share text. The rule depends on nothing else about the run, so evaluation does
    not change what it trains on. If there is not even one sample for each part, documents are split, and one part is too short.
    """
    train, valid = split_documents(len(lengths), fraction)
    by_documents = Split(SplitPart(train), SplitPart(valid))
    total = int(lengths.sum(dtype=np.int64))
    held = int(lengths[valid].sum(dtype=np.int64))
    if fraction <= 0 or min(held, total - held) >= sample or total < 2 * sample:
        return by_documents
    border = total - min(max(round(fraction * total), sample), total - sample)
    return Split(SplitPart(end=border), SplitPart(first=border), by_tokens=True)
