"""Which tokens of a source are trained on and which are held out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megascale.data.order import split_documents


@dataclass(frozen=True)
class SplitPart:
    """Of a token file: documents `documents` (None: all of them) end to end, and of that stream the tokens from `first` up to `end`
    (None: to its end).
    """

    documents: NDArray[np.int64] | None = None
    first: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Split:
    """`by_tokens`: a document may be cut at the border, since whole ones could not be held out."""

    train: SplitPart
    valid: SplitPart
    by_tokens: bool = False

    def part(self, name: str) -> SplitPart:
        return {"train": self.train, "valid": self.valid, "all": SplitPart()}[name]


def split_source(lengths: NDArray[np.integer], fraction: float, sample: int) -> Split:
    """The split of documents of `lengths` tokens, of which a `fraction` is held out, for samples of `sample` tokens.

    Documents are held out whole (`split_documents`), so that nothing of a held-out text is seen in training. Where that leaves a part
    without a single sample, as with a corpus that is one text file, the tail of the stream is held out instead: `fraction` of its tokens,
    and at least one sample. The tail and not a sample here and there, since neighbours share a text. The rule knows nothing of the run but
    the length of a sample: whether and how often a run evaluates does not change what it trains on. Where not even one sample for each part
    is there, the split is that of documents, and one part is too short.
    """
    train, valid = split_documents(len(lengths), fraction)
    by_documents = Split(SplitPart(train), SplitPart(valid))
    total = int(lengths.sum(dtype=np.int64))
    held = int(lengths[valid].sum(dtype=np.int64))
    if fraction <= 0 or min(held, total - held) >= sample or total < 2 * sample:
        return by_documents
    border = total - min(max(round(fraction * total), sample), total - sample)
    return Split(SplitPart(end=border), SplitPart(first=border), by_tokens=True)
