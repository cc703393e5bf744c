"""Span corruption (T5, arXiv 1910.10683): from any text a source with marked gaps, and a target that fills them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megascale.config.spans import Spans
from megascale.data.masking import ODD, seed_of
from megascale.splitmix import mix64

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Corruption:
    """`sizes` of every sample; marks are the tokens below `marks_end`, used in descending order."""

    seed: int
    sizes: Spans
    marks_end: int
    end: int

    def corrupt(self, tokens: Tokens, sample: int) -> tuple[Tokens, Tokens]:
        """A window [sizes.tokens] of sample number `sample` → source [sizes.source] and target [sizes.target], each with the end token.
        Depends only on its arguments, like masks (masking.py). The first run is text and the last one hidden, as in T5's code.
        """
        s = self.sizes
        shown = cut_up(s.tokens - s.hidden, s.spans, seed_of(self.seed, "shown", sample))
        hidden = cut_up(s.hidden, s.spans, seed_of(self.seed, "hidden", sample))
        borders = np.cumsum(np.stack((shown, hidden), 1).ravel())[:-1]
        runs = np.split(tokens, borders)
        marks = [np.array([self.marks_end - 1 - i]) for i in range(s.spans)]
        end = [np.array([self.end])]
        source = [part for i in range(s.spans) for part in (runs[2 * i], marks[i])]
        target = [part for i in range(s.spans) for part in (marks[i], runs[2 * i + 1])]
        return np.concatenate(source + end), np.concatenate(target + end)


def cut_up(length: int, parts: int, seed: np.uint64) -> NDArray[np.int64]:
    """Random lengths [parts], each at least 1, with the sum `length`: every such list is equally likely."""
    order = np.argsort(mix64(np.arange(1, length, dtype=np.uint64) * ODD + seed), kind="stable")
    borders = np.sort(order[: parts - 1]) + 1
    return np.diff(np.concatenate(([0], borders, [length])))
