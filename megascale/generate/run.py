"""Prompts → continuations, in one process or with the weights cut over tensor ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megascale.comm.collectives import all_gather
from megascale.errors import UsageError
from megascale.generate.cache import Place, remember
from megascale.generate.sample import choose
from megascale.model.decoder import Decoder
from megascale.model.position import alibi_slopes
from megascale.model.relative import bias_by_distance
from megascale.parallel.apply import ParallelModel


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen (`sample.choose`), and when to end: after `most` tokens, or behind one of `ends`."""

    most: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ends: frozenset[int] = frozenset()


@torch.no_grad()
def generate(model: ParallelModel, prompts: Sequence[Sequence[int]], how: Sampling) -> list[list[int]]:
    """The tokens that follow each prompt, an end among them where it came; every rank calls and gets the same.

    Each pass computes new tokens alone. The model's attentions get caches, which are gone with the next call. Raises UsageError for a
    prompt that is empty, holds a token that the model does not know, or is too long where positions are learned.
    """
    stage = model.model
    assert isinstance(stage, Decoder) and stage.cfg.vocab_size is not None
    check(stage, prompts, how)
    device = next(stage.parameters()).device
    length = max(map(len, prompts))
    tokens = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts], device=device)
    positions = torch.tensor([range(len(p) - length, len(p)) for p in prompts], device=device)
    place = Place(positions[:, :0])
    remember(stage, place, stage.cfg.sliding_window, distance_bias(stage, device))
    stage.xpos_middle = 0  # queries and keys of different passes count from the same place
    before, stage.enter_head = stage.enter_head, partial(_last, then=stage.enter_head)
    generator = torch.Generator().manual_seed(how.seed)
    found: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    try:
        for _ in range(how.most):
            place.add(positions)
            logits = model.module(tokens, positions=positions.clamp(min=0))[:, -1]
            chosen = choose(_whole(stage, logits), how.temperature, how.top_p, generator)
            for i, token in enumerate(chosen.tolist()):
                if going[i]:
                    found[i].append(token)
                    going[i] = token not in how.ends
            if not any(going):
                break
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
    finally:
        stage.enter_head = before
    return found


def distance_bias(stage: Decoder, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """What the heads here add to scores for distances [b, n, t] → [b, h, n, t]; None where they look at no distance."""
    cfg = stage.cfg
    if stage.relative is not None:
        return partial(bias_by_distance, stage.relative.weight, furthest=cfg.relative_distance, causal=True)
    if cfg.position != "alibi":
        return None
    slopes = torch.tensor((cfg.alibi_slopes or alibi_slopes(cfg.num_heads))[slice(*stage.heads_here)], device=device)
    return lambda back: -slopes[:, None, None] * back[:, None]


def _last(x: Tensor, then: Any) -> Tensor:
    """The head is asked about the last token only."""
    return then(x[:, -1:])  # type: ignore[no-any-return]


def _whole(stage: Decoder, logits: Tensor) -> Tensor:
    """[b, V here] → [b, V]"""
    assert stage.cfg.vocab_size is not None
    if stage.vocab_axis is not None:
        logits = all_gather(logits, stage.vocab_axis, 1)
    return logits[:, : stage.cfg.vocab_size]


def check(stage: Decoder, prompts: Sequence[Sequence[int]], how: Sampling) -> None:
    vocabulary = stage.cfg.vocab_size or 0
    for number, prompt in enumerate(prompts):
        wrong = next((t for t in prompt if not 0 <= t < vocabulary), None)
        if not prompt:
            raise UsageError(f"prompt {number + 1} has no tokens: give it some text")
        if wrong is not None:
            raise UsageError(
                f"prompt {number + 1} holds token {wrong}, and the model knows {vocabulary}: use the tokenizer it was trained with"
            )
        if stage.cfg.position == "learned" and len(prompt) + how.most > stage.shape.seq_len:
            raise UsageError(
                f"prompt {number + 1} has {len(prompt)} tokens and {how.most} are wanted, and the model has {stage.shape.seq_len} learned "
                "positions: shorten the prompt or --max-new-tokens"
            )
