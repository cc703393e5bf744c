"""How much of a text span corruption hides, as plain numbers for the support table, the data and the docs.

A window of text becomes a source, in which one mark replaces each hidden span, and a target, in which each mark is followed by its span
(T5, arXiv 1910.10683, section 3.1.4). Both end with the end token.
"""

from __future__ import annotations

from dataclasses import dataclass

SENTINELS = 100  # marks, the last tokens of the vocabulary (T5's number), and so the most spans per sample


@dataclass(frozen=True)
class Spans:
    """A window of `tokens`, of which `hidden` are hidden in `spans` runs."""

    tokens: int
    hidden: int
    spans: int

    @property
    def source(self) -> int:
        return self.tokens - self.hidden + self.spans + 1

    @property
    def target(self) -> int:
        return self.hidden + self.spans + 1


def spans_of(tokens: int, fraction: float, mean: float) -> Spans:
    """Spans of a window of at least two `tokens`. A run of text goes before each span, so there are as many runs as spans."""
    hidden = min(max(round(tokens * fraction), 1), tokens - 1)
    return Spans(tokens, hidden, max(1, min(round(hidden / mean), hidden, tokens - hidden)))


def longest_window(source_len: int, fraction: float, mean: float) -> Spans | None:
    """The longest window whose source has at most `source_len` tokens; None if not even two fit."""
    if spans_of(2, fraction, mean).source > source_len:
        return None
    fits, too_long = 2, 4
    while spans_of(too_long, fraction, mean).source <= source_len:
        fits, too_long = too_long, 2 * too_long
    while too_long - fits > 1:  # a longer window never has a shorter source
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if spans_of(middle, fraction, mean).source <= source_len else (fits, middle)
    return spans_of(fits, fraction, mean)
