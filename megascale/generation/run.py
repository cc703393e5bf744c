"""Prompts → continuations, in one process or with weights sharded over tensor ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megascale.comm.collectives import all_gather
from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.generation.cache import Bias, CacheLayer, part_length, remembering
from megascale.generation.sample import choose
from megascale.generation.speculate import Counts, Drafter, Texts, accepted
from megascale.measure.health import free_memory
from megascale.model.decoder import Decoder
from megascale.model.position import alibi_slopes
from megascale.model.relative import bias_by_distance
from megascale.parallel.model import ParallelModel
from megascale.sizes import byte_words

SEEDS = range(-(1 << 63), 1 << 64)  # seeds that torch's generators accept


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen (`sample.choose`), and when to stop: after `most` tokens, or after one of `ends`. `drafts`: tokens that
    multi-token prediction drafts before every pass; None: as many as it can if the likeliest tokens are wanted, else none.
    """

    most: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ends: frozenset[int] = frozenset()
    drafts: int | None = None

    def drafts_of(self, stage: Decoder) -> int:
        """The number of drafts with this model."""
        return self.drafts if self.drafts is not None else stage.cfg.mtp_depth if self.temperature == 0.0 else 0


@torch.no_grad()
def generate(model: ParallelModel, prompts: Sequence[Sequence[int]], how: Sampling, counts: Counts | None = None) -> list[list[int]]:
    """The tokens that follow each prompt, including the end token if reached. Collective; all ranks get the same.

    Each pass computes only new tokens; a long prompt takes several passes. The model is left as it was. `counts` hears about passes and
    drafts. Raises UsageError for a prompt that is empty, holds an unknown token, is longer than learned positions, or does not fit into
    memory, and for drafts that the model cannot make.
    """
    stage = model.model
    assert isinstance(stage, Decoder) and stage.cfg.vocab_size is not None
    check(stage, prompts, how)
    device, drafts = next(stage.parameters()).device, how.drafts_of(stage)
    length = max(map(len, prompts))
    check_memory(stage, len(prompts), length, how.most, drafts, device)
    places = [CacheLayer(torch.empty(len(prompts), 0, dtype=torch.int64, device=device), length) for _ in range(1 + drafts)]
    texts = Texts.of(prompts, how.most, drafts, device)
    with reading(model, stage) as head, remembering(stage, places[0], partial(distance_bias, stage, device), places[1:]):
        drafter = Drafter(stage, drafts, places[1:], head.enter) if drafts else None
        return _continue(model, stage, texts, how, places[0], head, drafter, counts or Counts())


def _continue(
    model: ParallelModel,
    stage: Decoder,
    texts: Texts,
    how: Sampling,
    place: CacheLayer,
    head: Head,
    drafter: Drafter | None,
    counts: Counts,
) -> list[list[int]]:
    """The loop of `generate` over texts that hold the prompts."""
    begin, device = texts.length.tolist(), texts.tokens.device
    batch, longest, drafts = len(begin), max(begin), drafter.drafts if drafter else 0
    whole = [m for m in stage.cfg.variants.values() if distance_bias(stage, device, m) is not None or has_whole_scores(m)]
    heads = max((len(stage.exchanges.query_heads(m.num_heads)) for m in whole), default=1)
    generator = torch.Generator().manual_seed(how.seed)
    going = torch.ones(batch, dtype=torch.bool)
    at = (texts.length[:, None] - longest + torch.arange(longest, device=device)).clamp(min=-1)  # prompts are padded on the left
    while True:
        most = part_length(batch, heads, place.positions.shape[1] + at.shape[1])
        streams, logits = [], []
        for part in at.split(most, 1):
            place.add(part)
            logits.append(model.module(texts.at(part), positions=part.clamp(min=0)))
            assert head.stream is not None
            streams.append(head.stream)
        chosen = choose(_whole(stage, torch.cat(logits, 1)[:, -head.rows :].flatten(0, 1)), how.temperature, how.top_p, generator).view(
            batch, -1
        )
        checked = at[:, -head.rows :]
        taken = accepted(texts, checked, chosen)
        counts.add(checked, taken)
        rejected = checked.where(torch.arange(head.rows, device=device) > taken[:, None], -1)
        texts.put(taken, chosen.gather(1, taken[:, None])[:, 0])
        texts.advance(going, chosen, taken, how.ends)
        if not going.any():
            return [row[start:end] for row, start, end in zip(texts.tokens.tolist(), begin, texts.length.tolist())]
        if drafter is not None:
            place.hide(rejected)
            at[:, -head.rows :].masked_fill_(rejected >= 0, -1)
            drafter.draft(texts, at, torch.cat(streams, 1), most)
        at, head.rows = texts.next_pass(drafts, going.to(device)), 1 + drafts


@dataclass
class Head:
    """In generation, stands before the head: keeps the stream [b, n, d], and lets only the last `rows` tokens of it pass to logits."""

    enter: Callable[[Tensor], Tensor]
    rows: int = 1
    stream: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        self.stream = x
        return self.enter(x[:, -self.rows :])


def has_whole_scores(cfg: Model) -> bool:
    """Whether the scores of all heads exist at once in layers with this config: no kernel of torch's knows caps and sinks."""
    return cfg.attention_sink is not None or cfg.attention_softcap is not None


@contextmanager
def reading(model: ParallelModel, stage: Decoder) -> Iterator[Head]:
    """Puts the model into evaluation mode, with logits of the last tokens only and one XPos origin for all passes; restores it after."""
    middle, head = stage.xpos_middle, Head(stage.enter_head)
    modes = [(m, m.training) for module in model.modules for m in module.modules()]
    try:
        model.train(False)
        stage.xpos_middle, stage.enter_head = 0, head  # type: ignore[method-assign]
        yield head
    finally:
        stage.xpos_middle = middle
        del stage.enter_head
        for m, training in modes:
            m.training = training


def check_memory(stage: Decoder, batch: int, length: int, most: int, drafts: int, device: torch.device) -> None:
    """Raises UsageError if the caches for prompts of `length` plus `most` new tokens do not fit into memory, or if the attention does not
    state their size.
    """
    columns, wide = length + most + drafts, torch.promote_types(stage.shape.compute, torch.float32)
    if batch > 1:
        columns += most * drafts  # at most: what one row rejects keeps its place if another accepts it
    kept, fixed = 0.0, 0.0
    for layer in [*range(stage.cfg.num_layers), *[stage.cfg.num_layers - 1] * drafts]:
        cfg = stage.cfg.at_layer(layer)
        cached = cfg.attention_row.cached
        if cached is None:
            raise UsageError(
                f"model.attention is {cfg.attention}, whose row does not say what generation keeps of a token: set `cached` in its row, or "
                "generate from a model with another kind"
            )
        heads = len(stage.exchanges.query_heads(cfg.num_heads))
        kept, fixed = kept + cached(cfg, heads), fixed + cfg.attention_row.state(cfg, heads)
    needed = batch * (kept * columns * stage.shape.compute.itemsize + fixed * wide.itemsize)
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


def _whole(stage: Decoder, logits: Tensor) -> Tensor:
    """[n, V here] → [n, V]"""
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
    if how.drafts and how.temperature:
        raise UsageError(
            f"--drafts is {how.drafts} and --temperature is {how.temperature:g}: drafts are for the likeliest tokens; leave out one"
        )
    if how.drafts_of(stage) > stage.cfg.mtp_depth:
        raise UsageError(
            f"--drafts is {how.drafts}, but the model has {stage.cfg.mtp_depth} modules of multi-token prediction, which make one draft "
            f"each: give at most {stage.cfg.mtp_depth}"
        )
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
