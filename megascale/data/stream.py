"""Chosen documents of a token file as one stream of tokens."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]


class Documents(Protocol):
    """The source of a stream: a `TokenFile`, or `TokenLists` in memory. `lengths` [documents]: tokens per document."""

    lengths: NDArray[np.integer]

    def __len__(self) -> int: ...

    def read(self, number: int, start: int = 0, length: int | None = None) -> NDArray[np.generic]:
        """Tokens [start, start+length) of one document."""


class TokenStream:
    """Documents `documents` (None: all) of a token file, end to end, and of these the tokens from `first` up to `end`. Eight bytes of
    memory per document.
    """

    def __init__(self, file: Documents, documents: NDArray[np.int64] | None = None, first: int = 0, end: int | None = None) -> None:
        self.file = file
        self.documents: NDArray[np.int64] = np.arange(len(file)) if documents is None else documents
        self.ends: NDArray[np.int64] = np.cumsum(file.lengths[self.documents], dtype=np.int64)
        total = int(self.ends[-1]) if len(self.ends) else 0
        self.first, self.end = first, total if end is None else end

    def __len__(self) -> int:
        return self.end - self.first

    def read(self, start: int, length: int) -> tuple[Tokens, NDArray[np.int32]]:
        """Tokens [start, start+length), and for each the number of its document in the stream; O(log documents).

        Raises IndexError if the stream is too short.
        """
        if not 0 <= start <= start + length <= len(self):
            raise IndexError(f"tokens {start} to {start + length} of a stream of {len(self)}")
        start += self.first
        tokens, numbers = np.empty(length, np.int64), np.empty(length, np.int32)
        document, done = int(np.searchsorted(self.ends, start, side="right")), 0
        while done < length:
            begin = start + done - (int(self.ends[document - 1]) if document else 0)
            part = self.file.read(int(self.documents[document]), begin)[: length - done]
            tokens[done : done + len(part)], numbers[done : done + len(part)] = part, document
            done, document = done + len(part), document + 1
        return tokens, numbers
