"""Evaluations: a file of items, how they are scored, and what is reported. A kind is a row of `KINDS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megascale.data.tokenizer import Tokenizer
from megascale.errors import UsageError
from megascale.evaluation.files import Item, read_items
from megascale.evaluation.requests import Request, following, rolling
from megascale.evaluation.score import Scorer

Results = dict[str, float]
STOP = ["\n"]
HALF = "\ufffd"  # what decoders put for bytes that are no whole character yet


@dataclass(frozen=True)
class Task:
    """An evaluation that is ready to run: its items, and the requests of each."""

    name: str
    kind: str
    items: list[Item]
    requests: list[list[Request]]
    tokenizer: Tokenizer


def open_task(name: str, kind: str, path: Path, tokenizer: Tokenizer, length: int, vocab_size: int) -> Task:
    """Reads and tokenizes a file for a model of `length` tokens. Raises UsageError."""
    items = read_items(path, kind)
    requests = []
    for number, item in enumerate(items, 1):
        found = KINDS[kind].requests(item, tokenizer, length)
        if any(not r.wanted or not r.context for r in found):
            raise UsageError(f"{path}, item {number} has a text without tokens of its own in {tokenizer.path}: give a longer one")
        if wrong := next((t for r in found for t in (*r.context, *r.wanted) if t >= vocab_size), None):
            raise UsageError(
                f"{path}, item {number} has token {wrong}, and the model knows {vocab_size}: use the tokenizer it was trained with"
            )
        requests.append(found)
    return Task(name, kind, items, requests, tokenizer)


def run_task(task: Task, scorer: Scorer) -> Results:
    """Collective."""
    return KINDS[task.kind].run(task, scorer)


def _choices(item: Item, tokenizer: Tokenizer, length: int) -> list[Request]:
    return [following(tokenizer, item["context"], choice) for choice in item["choices"]]


def _text(item: Item, tokenizer: Tokenizer, length: int) -> list[Request]:
    return rolling(tokenizer, item["text"], length)


def _prompt(item: Item, tokenizer: Tokenizer, length: int) -> list[Request]:
    return [Request(tokenizer.encode_prompt(item["prompt"]), [0])]


def log_likelihoods(task: Task, scorer: Scorer) -> list[list[float]]:
    """Of each request, by item."""
    scores = iter(scorer.scores([r for some in task.requests for r in some]))
    return [[next(scores).log_likelihood for _ in some] for some in task.requests]


def choice(task: Task, scorer: Scorer) -> Results:
    """The share of items whose right choice is the likeliest, by itself and per character, as lm-eval's acc and acc_norm."""
    right = normed = 0
    for item, found in zip(task.items, log_likelihoods(task, scorer)):
        per_character = [x / len(c) for x, c in zip(found, item["choices"])]
        right += found.index(max(found)) == item["answer"]
        normed += per_character.index(max(per_character)) == item["answer"]
    return {"accuracy": right / len(task.items), "accuracy_norm": normed / len(task.items)}


def bits(task: Task, scorer: Scorer) -> Results:
    """Bits per byte of UTF-8 over all texts."""
    total = sum(map(sum, log_likelihoods(task, scorer)))
    size = sum(len(item["text"].encode()) for item in task.items)
    return {"bits_per_byte": -total / math.log(2) / size}


def exact(task: Task, scorer: Scorer) -> Results:
    """The share of prompts whose greedy continuation, up to a stop text or an end of document, is the answer, without white space around
    either. The whole text passes the model again for every token, which is right on every layout; a text stops as soon as it cannot become
    the answer.
    """
    texts = [list(some[0].context) for some in task.requests]
    begin = [len(t) for t in texts]
    right: dict[int, bool] = {}
    while going := [i for i in range(len(texts)) if i not in right]:
        for i, token in zip(going, scorer.next_tokens([texts[i] for i in going])):
            texts[i].append(token)
            if (found := verdict(task.items[i], texts[i][begin[i] :], task.tokenizer)) is not None:
                right[i] = found
    return {"exact_match": sum(right.values()) / len(task.items)}


def verdict(item: Item, made: Sequence[int], tokenizer: Tokenizer) -> bool | None:
    """Whether a continuation is the answer; None while that is open."""
    ended = made[-1] == tokenizer.eos_id
    text, answer = tokenizer.decode(made[:-1] if ended else made), item["answer"].strip()
    if not ended:
        text = text.rstrip(HALF)
    ends = [place for stop in item.get("stop", STOP) if (place := text.find(stop)) >= 0]
    if ends or ended:
        return text[: min(ends, default=len(text))].strip() == answer
    said = text.lstrip()
    still = answer.startswith(said) or (said.startswith(answer) and _may_end(said[len(answer) :], item.get("stop", STOP)))
    # A model that repeats white space, or tokens without text, would never come to an end.
    return None if still and len(made) <= 4 * len(answer.encode()) + 32 else False


def _may_end(rest: str, stops: Sequence[str]) -> bool:
    """Whether what follows the answer is white space, or may become a stop text."""
    return not rest.strip() or any(stop.startswith((rest, rest.lstrip())) for stop in stops)


@dataclass(frozen=True)
class Kind:
    """requests: of an item, for a model of some length; run: the results over all items."""

    requests: Callable[[Item, Tokenizer, int], list[Request]]
    run: Callable[[Task, Scorer], Results]


KINDS: Mapping[str, Kind] = {"choice": Kind(_choices, choice), "bits": Kind(_text, bits), "exact": Kind(_prompt, exact)}
