"""Prompts as text or token ids → continuations as plain data, for Python programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascale.data.tokenizer import Tokenizer
from megascale.errors import UsageError
from megascale.formats.tokenizer_build import open_tokenizer
from megascale.formats.tokenizer_files import find_prefix, find_tokenizer
from megascale.generation.loaded import LoadedModel
from megascale.generation.run import Sampling, generate
from megascale.model.decoder import Decoder
from megascale.parallel.model import ParallelModel
from megascale.train.session import Session


@dataclass(frozen=True)
class Asked:
    """How to continue, as the arguments of `api.generate`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    ignore_end: bool
    tokenizer: Path | None

    def __post_init__(self) -> None:
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}: give a whole number, 1 or more")
        for name, number in (("temperature", self.temperature), ("top_p", self.top_p), ("seed", self.seed)):
            if isinstance(number, bool) or not isinstance(number, int if name == "seed" else int | float):
                raise UsageError(f"{name} is {number!r}: give a {'whole ' if name == 'seed' else ''}number")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UsageError(f"temperature is {self.temperature}: give 0, which takes the likeliest token, or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}: give a share above 0 and up to 1")


@dataclass(frozen=True)
class Speaker:
    """The parts needed to answer: model, path of its tokenizer, prefix of its data, end tokens."""

    held: ParallelModel
    tokenizer: Path | None
    prefix: str | None
    ends: frozenset[int]


def answer(model: LoadedModel | Session, prompts: str | Sequence[Any], asked: Asked) -> list[dict[str, Any]]:
    """[{"prompt", "tokens", "text"}], one for each prompt. Raises UsageError."""
    speaker = speaker_of(model)
    if isinstance(prompts, int | float):
        raise UsageError(f"the prompts are {prompts}: give a text, a list of texts, or a list of lists of token numbers")
    given: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise UsageError("there is no prompt: give a text, a list of texts, or a list of lists of token numbers")
    texts = [isinstance(prompt, str) for prompt in given]
    place = asked.tokenizer or speaker.tokenizer
    if any(texts) and place is None:
        raise UsageError("there is no tokenizer next to the model or its data: give tokenizer=, or prompts as lists of token numbers")
    tokenizer = open_tokenizer(place, speaker.prefix) if place is not None and (any(texts) or asked.tokenizer) else None
    ids = [tokenizer.encode_prompt(p) if tokenizer is not None and text else numbers(i, p) for i, (p, text) in enumerate(zip(given, texts))]
    ends = speaker.ends or (frozenset() if tokenizer is None else frozenset({tokenizer.eos_id}))
    how = Sampling(asked.max_new_tokens, asked.temperature, asked.top_p, asked.seed, frozenset() if asked.ignore_end else ends)
    found = generate(speaker.held, ids, how)
    return [{"prompt": p, "tokens": tokens, "text": text_of(tokenizer, tokens, how.ends)} for p, tokens in zip(given, found)]


def speaker_of(model: LoadedModel | Session) -> Speaker:
    if isinstance(model, LoadedModel):
        speaker = Speaker(model.held, model.opened.tokenizer, model.opened.prefix, model.opened.ends)
    elif isinstance(model, Session):
        plain = model.config.plain()
        speaker = Speaker(model.model, find_tokenizer(plain, Path(model.config.run_dir)), find_prefix(plain), frozenset())
    else:
        raise UsageError(f"the model is a {type(model).__name__}: give a path, what load_model returned, or a run in progress")
    if not isinstance(speaker.held.model, Decoder) or speaker.held.model.cfg.family != "decoder":
        raise UsageError(f"the model is of family {speaker.held.model.cfg.family}, but only a decoder generates text")
    if speaker.held.mesh.size > 1:
        raise UsageError(f"the run has {speaker.held.mesh.size} ranks, but a model generates in one process: load its checkpoint later")
    return speaker


def numbers(place: int, prompt: Any) -> list[int]:
    """Checks a prompt. Raises UsageError if it is not a list of whole numbers."""
    tokens = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(tokens, list | tuple) or not all(type(t) is int for t in tokens):
        raise UsageError(f"prompt {place + 1} is {str(prompt)[:60]!r}: give a text, or a list of token numbers")
    return list(tokens)


def text_of(tokenizer: Tokenizer | None, tokens: list[int], ends: frozenset[int]) -> str | None:
    return None if tokenizer is None else tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in ends else tokens)
