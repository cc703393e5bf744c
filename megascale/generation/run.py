"""Prompts → continuations, in one process or with weights sharded over tensor ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megascale.comm.collectives import all_gather
from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.generation.cache import Bias, CacheLayer, part_length, remembering
from megascale.generation.sample import choose
from megascale.measure.health import free_memory
from megascale.model.decoder import Decoder
from megascale.model.position import alibi_slopes
from megascale.model.relative import bias_by_distance
from megascale.parallel.model import ParallelModel
from megascale.sizes import byte_words

SEEDS = range(-(1 << 63), 1 << 64)  # seeds that torch's generators accept


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen (`sample.choose`), and when to stop: after `most` tokens, or after one of `ends`."""

    most: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ends: frozenset[int] = frozenset()


@torch.no_grad()
def generate(model: ParallelModel, prompts: Sequence[Sequence[int]], how: Sampling) -> list[list[int]]:
    """The tokens that follow each prompt, including the end token if reached. Collective; all ranks get the same.

    Each pass computes only new tokens; a long prompt takes several passes. The model is left as it was. Raises UsageError for a prompt that
    is empty, holds an unknown token, is longer than learned positions, or does not fit into memory.
    """
    stage = model.model
    assert isinstance(stage, Decoder) and stage.cfg.vocab_size is not None
    check(stage, prompts, how)
    device = next(stage.parameters()).device
    length = max(map(len, prompts))
    check_memory(stage, len(prompts), length, how.most, device)
    tokens = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts], device=device)
    positions = torch.tensor([range(len(p) - length, len(p)) for p in prompts], device=device)
    bias_of = partial(distance_bias, stage, device)
    heads = max((len(stage.exchanges.query_heads(m.num_heads)) for m in stage.cfg.variants.values() if bias_of(m) is not None), default=1)
    place = CacheLayer(positions[:, :0], length)
    generator = torch.Generator().manual_seed(how.seed)
    found: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    with reading(model, stage), remembering(stage, place, bias_of):
        for _ in range(how.most):
            most = part_length(len(prompts), heads, place.positions.shape[1] + tokens.shape[1])
            for new, at in zip(tokens.split(most, 1), positions.split(most, 1)):
                place.add(at)
                logits = model.module(new, positions=at.clamp(min=0))[:, -1]
            chosen = choose(_whole(stage, logits), how.temperature, how.top_p, generator)
            for i, token in enumerate(chosen.tolist()):
                if going[i]:
                    found[i].append(token)
                    going[i] = token not in how.ends
            if not any(going):
                break
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
    return found


@contextmanager
def reading(model: ParallelModel, stage: Decoder) -> Iterator[None]:
    """Puts the model into evaluation mode, with logits of the last token only and one XPos origin for all passes; restores it after."""
    middle, head = stage.xpos_middle, stage.exchanges.enter_head
    modes = [(m, m.training) for module in model.modules for m in module.modules()]
    try:
        model.train(False)
        stage.xpos_middle, stage.exchanges.enter_head = 0, partial(_last, then=head)
        yield
    finally:
        stage.xpos_middle, stage.exchanges.enter_head = middle, head
        for m, training in modes:
            m.training = training


def check_memory(stage: Decoder, batch: int, length: int, most: int, device: torch.device) -> None:
    """Raises UsageError if the caches for prompts of `length` plus `most` new tokens do not fit into memory, or if the attention does not
    state their size.
    """
    kept, fixed, wide = 0.0, 0.0, torch.promote_types(stage.shape.compute, torch.float32)
    for layer in range(stage.cfg.num_layers):
        cfg = stage.cfg.at_layer(layer)
        cached = cfg.attention_row.cached
        if cached is None:
            raise UsageError(
                f"model.attention is {cfg.attention}, whose row does not say what generation keeps of a token: set `cached` in its row, or "
                "generate from a model with another kind"
            )
        heads = len(stage.exchanges.query_heads(cfg.num_heads))
        kept, fixed = kept + cached(cfg, heads), fixed + cfg.attention_row.state(cfg, heads)
    needed = batch * (kept * (length + most) * stage.shape.compute.itemsize + fixed * wide.itemsize)
    free = free_memory(device)
    if needed > free:
        raise UsageError(
            f"keys and values of {batch} prompts of {length} tokens and {most} new ones take {byte_words(needed)} but {byte_words(free)} "
            "are free: lower --max-new-tokens, give fewer or shorter prompts, or more ranks"
        )


def distance_bias(stage: Decoder, device: torch.device, cfg: Model) -> Bias | None:
    """Score biases of the local heads in layers with the config `cfg`; None if they have none."""
    if stage.relative is not None:
        return partial(bias_by_distance, stage.relative.weight, furthest=cfg.relative_distance, causal=True)
    if not cfg.position_row.slopes:
        return None
    here = stage.exchanges.query_heads(cfg.num_heads)
    slopes = torch.tensor((cfg.alibi_slopes or alibi_slopes(cfg.num_heads))[here.start : here.stop], device=device)
    return lambda back: -slopes[:, None, None] * back[:, None]


def beyond(seq_len: int, prompts: Sequence[Sequence[int]], most: int) -> str | None:
    """A notice if a continuation may be longer than any text that the model was trained on."""
    longest = max(map(len, prompts))
    if longest + most <= seq_len:
        return None
    return (
        f"notice: the longest prompt has {longest} tokens and up to {most} more are wanted, but the model was trained on {seq_len} at "
        "once: the text after that length may make no sense"
    )


def _last(x: Tensor, then: Any) -> Tensor:
    """Computes logits of the last token only."""
    return then(x[:, -1:])  # type: ignore[no-any-return]


def _whole(stage: Decoder, logits: Tensor) -> Tensor:
    """[b, V here] → [b, V]"""
    assert stage.cfg.vocab_size is not None
    if stage.exchanges.rows is not None:
        logits = all_gather(logits, stage.exchanges.rows, 1)
    return logits[:, : stage.cfg.vocab_size]


def check_not_empty(prompts: Sequence[Sequence[int]]) -> None:
    empty = next((number for number, prompt in enumerate(prompts, 1) if not prompt), None)
    if empty is not None:
        raise UsageError(f"prompt {empty} has no tokens: give it some text")


def check(stage: Decoder, prompts: Sequence[Sequence[int]], how: Sampling) -> None:
    vocabulary = stage.cfg.vocab_size or 0
    if how.seed not in SEEDS:
        raise UsageError(f"--seed is {how.seed}: give a number from {SEEDS.start} to {SEEDS.stop - 1}")
    check_not_empty(prompts)
    for number, prompt in enumerate(prompts):
        wrong = next((t for t in prompt if not 0 <= t < vocabulary), None)
        if wrong is not None:
            raise UsageError(
                f"prompt {number + 1} holds token {wrong}, and the model knows {vocabulary}: use the tokenizer it was trained with"
            )
        if stage.cfg.position_row.table and len(prompt) + how.most > stage.shape.seq_len:
            raise UsageError(
                f"prompt {number + 1} has {len(prompt)} tokens and {how.most} are wanted, but the model has {stage.shape.seq_len} learned "
                "positions: shorten the prompt or --max-new-tokens"
            )
