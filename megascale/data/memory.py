"""Samples in memory: lists of token ids that a Python program passes instead of token files. Each is a document, as in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megascale.errors import UsageError

PLACE = "<samples>"  # value of data.train for samples in memory; not a valid file name
NAME = "samples"  # name of the source, which determines the order of samples like that of a token file
NEEDED = "give something with a length whose items are lists of token numbers, one per document"


class Samples(Protocol):
    """Anything with a length and an index whose items are lists of token numbers: a list, a dataset, an array [documents, tokens]."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class TokenLists:
    """Documents in memory with the interface of a `TokenFile`. All are read once, for lengths and fingerprint, and again when a sample
    needs them, possibly in another thread. Raises UsageError for anything that is not a list of tokens.
    """

    def __init__(self, samples: Samples) -> None:
        if isinstance(samples, str | bytes | dict) or not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
            raise UsageError(f"samples is a {type(samples).__name__}: {NEEDED}")
        self.samples = samples
        digest, lengths, self.largest = hashlib.blake2b(digest_size=8), list[int](), -1
        for tokens in self._each():
            digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
            lengths.append(len(tokens))
            self.largest = max(self.largest, int(tokens.max(initial=-1)))
        if not sum(lengths):
            raise UsageError(f"samples has {len(lengths)} documents but no tokens: {NEEDED}")
        self.lengths: NDArray[np.integer] = np.array(lengths, np.int64)
        self.fingerprint = f"{len(lengths)} documents, {sum(lengths)} tokens, {digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int, start: int = 0, length: int | None = None) -> NDArray[np.int64]:
        """Tokens [start, start+length) of one document. Raises UsageError if its length has changed."""
        tokens = self._document(number)
        if len(tokens) != self.lengths[number]:
            had = f"had {self.lengths[number]} when training began"
            raise UsageError(f"samples[{number}] has {len(tokens)} tokens but {had}: samples must not change")
        return tokens[start:] if length is None else tokens[start : start + length]

    def _each(self) -> Iterator[NDArray[np.int64]]:
        return (self._document(number) for number in range(len(self.samples)))

    def _document(self, number: int) -> NDArray[np.int64]:
        try:
            item = self.samples[number]
        except (LookupError, TypeError, ValueError) as error:
            raise self._unread(number, error) from None
        try:
            tokens = np.asarray(item)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise self._unread(number, error) from None
        if tokens.ndim == 1 and not tokens.size:
            return np.zeros(0, np.int64)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise UsageError(f"samples[{number}] is {_short(item)}, not a list of whole numbers: {NEEDED}")
        if int(tokens.min()) < 0 or int(tokens.max()) >= 1 << 62:
            raise UsageError(f"samples[{number}] holds {tokens.min()} to {tokens.max()}: tokens count from 0 to the size of the vocabulary")
        return tokens.astype(np.int64)

    def _unread(self, number: int, error: Exception) -> UsageError:
        return UsageError(f"samples[{number}] cannot be read as a list ({type(error).__name__}: {error}): {NEEDED}")


def _short(item: Any) -> str:
    text = " ".join(repr(item).split())
    return text if len(text) <= 60 else text[:57] + "..."
