"""From texts to tokens to score, as lm-eval's HFLM does it, so that log-likelihoods can be compared.

A request is a context and the tokens that follow it. Both together are cut on the left to the model's length; the first token of a text
without context follows a prefix token, which begins documents, or else ends them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from megascale.data.tokenizer import IN_FOLDERS, Tokenizer
from megascale.errors import UsageError


class Request(NamedTuple):
    """Score `wanted` after `context`; both are token ids, neither is empty."""

    context: list[int]
    wanted: list[int]

    def cut(self, length: int) -> tuple[list[int], list[int]]:
        """The inputs, at most `length` of them, and the targets of the last ones."""
        tokens = (self.context + self.wanted)[-(length + 1) :]
        wanted = self.wanted[-length:]
        return tokens[:-1], wanted


def prefix_token(tokenizer: Tokenizer) -> int:
    """What the first token of a text follows. Raises UsageError if no file names such a token."""
    if tokenizer.begin:
        return tokenizer.begin[0]
    if tokenizer.begin is None and tokenizer.path.name in IN_FOLDERS:
        with suppress(UsageError):  # many models have only a token that ends a document
            return tokenizer.bos_id
    return tokenizer.eos_id


def following(tokenizer: Tokenizer, context: str, text: str) -> Request:
    """The request for `text` after `context`. Spaces at the end of a context go to the text, since words begin with them."""
    if not context:
        wanted, first = plain_tokens(tokenizer, text), prefix_token(tokenizer)
        return Request([first], wanted) if wanted[0] != first else Request(wanted[:1], wanted[1:])
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, text = context[:-spaces], context[-spaces:] + text
    if not context:
        return following(tokenizer, "", text)
    before = tokenizer.encode_prompt(context)
    return Request(before, tokenizer.encode_prompt(context + text)[len(before) :])


def plain_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    return [int(i) for i in tokenizer.encode_batch([text])[0]]


def rolling(tokenizer: Tokenizer, text: str, length: int) -> list[Request]:
    """A text cut into windows of `length` tokens, each scored once, after one token or as many as fill the last window."""
    return list(windows(tokenizer.encode_prompt(text), prefix_token(tokenizer), length))


def windows(tokens: Sequence[int], prefix: int, length: int) -> Iterator[Request]:
    """lm-eval's rolling windows with a context of one token."""
    whole = [prefix, *tokens]
    for begin in range(0, len(tokens), length):
        end = min(begin + length, len(tokens))
        first = max(0, end - length) if begin else 0  # the last window looks back, so that it is as long as the others
        yield Request(whole[first : begin + 1], list(tokens[begin:end]))
