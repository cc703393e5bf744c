"""Speculation: the modules of multi-token prediction draft the next tokens, and one pass of the model checks all of them. Greedy text stays
what it is without drafts, up to ties of the arithmetic.

Module k sees the stream at a position and the token k places after it, which may itself be a draft. So what it keeps of its last k − 1
positions is computed anew in the next round, from the tokens that were accepted. Rows of a batch accept different numbers of drafts:
columns that a row rejects get the position −1, to which nobody attends.

Shapes: b batch, n tokens of a pass, d hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from megascale.generation.cache import CacheLayer
from megascale.model.ahead import Ahead
from megascale.model.decoder import Decoder


@dataclass
class Counts:
    """Passes of the model, drafts that they checked, and drafts that were accepted, over all prompts."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, checked: Tensor, taken: Tensor) -> None:
        """A pass that checked the drafts at positions [b, 1 + n] behind the first, and took some [b] of them."""
        self.passes += 1
        self.drafted += int((checked[:, 1:] >= 0).sum())
        self.accepted += int(taken.sum())


@dataclass
class Texts:
    """The tokens of a batch, and how far each row has come.

    tokens  [b, room]; behind a row's `length` its drafts
    length  [b] tokens that are sure; the last one has not passed the model yet
    limit   [b] tokens that a row may have in the end
    """

    tokens: Tensor
    length: Tensor
    limit: Tensor

    @staticmethod
    def of(prompts: Sequence[Sequence[int]], most: int, drafts: int, device: torch.device) -> Texts:
        length = torch.tensor([len(p) for p in prompts], device=device)
        tokens = torch.zeros(len(prompts), int(length.max()) + most + drafts + 1, dtype=torch.int64, device=device)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = torch.tensor(prompt, device=device)
        return Texts(tokens, length, length + most)

    def at(self, positions: Tensor) -> Tensor:
        """Tokens [b, n] at positions [b, n]; any token at negative ones."""
        return self.tokens.gather(1, positions.clamp(min=0))

    def put(self, behind: int | Tensor, found: Tensor) -> None:
        """Writes one token [b] per row, `behind` (one number, or [b]) places after the sure ones."""
        self.tokens.scatter_(1, (self.length + behind)[:, None], found[:, None])

    def advance(self, going: Tensor, chosen: Tensor, taken: Tensor, ends: frozenset[int]) -> None:
        """Makes the drafts that were taken [b], the first of `chosen` [b, 1 + n], and the token behind them sure, in rows that are going
        [b, on the host]. A row ends after one of `ends` and at its limit.
        """
        more = [0] * len(going)
        for i, (row, n, left) in enumerate(zip(chosen.tolist(), taken.tolist(), (self.limit - self.length).tolist())):
            if going[i]:
                end = next((j for j, token in enumerate(row[: n + 1], 1) if token in ends), None)
                more[i] = end or n + 1
                going[i] = end is None and more[i] < left
        self.length += torch.tensor(more, device=self.length.device)

    def next_pass(self, drafts: int, going: Tensor) -> Tensor:
        """Positions [b, 1 + drafts] of the last sure token and of the drafts after it; −1 where nothing more is wanted."""
        at = self.length[:, None] - 1 + torch.arange(drafts + 1, device=self.length.device)
        return at.where((at < self.limit[:, None] - 1) & going[:, None], -1)


@dataclass
class Drafter:
    """The modules of multi-token prediction at work.

    places  positions of what each module keeps
    stream  [b, n, d] the stream before the head at the last `positions` [b, n], which may change their tokens ahead
    """

    stage: Decoder
    drafts: int
    places: list[CacheLayer]
    enter_head: Callable[[Tensor], Tensor]
    positions: Tensor | None = None
    stream: Tensor | None = None
    ahead: list[Ahead] = field(init=False)

    def __post_init__(self) -> None:
        self.ahead = [a for a in self.stage.mtp.values() if isinstance(a, Ahead)][: self.drafts]

    def draft(self, texts: Texts, positions: Tensor, stream: Tensor, most: int) -> None:
        """Writes drafts behind the sure tokens, given the stream [b, n, d] at new positions [b, n]; passes of up to `most` tokens."""
        if self.positions is not None and self.stream is not None:
            for place in self.places:
                place.hide(self.positions)
            positions, stream = torch.cat((self.positions, positions), 1), torch.cat((self.stream, stream), 1)
        x, last = stream, positions.argmax(1)[:, None]
        for k, ahead in enumerate(self.ahead, 1):
            parts = zip(positions.split(most, 1), x.split(most, 1))
            x = torch.cat([self._pass(k, ahead, texts.at(at + k), at, part) for at, part in parts], 1)
            texts.put(k - 1, self._token(ahead.norm(x.take_along_dim(last[..., None], 1))))
        kept = positions.topk(min(self.drafts - 1, positions.shape[1]), 1, sorted=True).indices.flip(1)
        self.positions, self.stream = positions.gather(1, kept), stream.take_along_dim(kept[..., None], 1)

    def _pass(self, k: int, ahead: Ahead, tokens: Tensor, at: Tensor, x: Tensor) -> Tensor:
        self.places[k - 1].add(at)
        layer, stage = self.stage.cfg.num_layers + k - 1, self.stage
        mask_of = partial(stage.attention_mask, documents=None, seq_len=tokens.shape[1], device=tokens.device)  # the cap is part of it
        (context,) = stage.contexts(range(layer, layer + 1), tokens, mask_of, at.clamp(min=0), None, None)
        return ahead(x, stage.embedded(tokens, stage.embedding), context)  # type: ignore[no-any-return]

    def _token(self, x: Tensor) -> Tensor:
        """The normalized stream [b, 1, d] → the likeliest tokens [b]."""
        return self.stage.likeliest(self.enter_head(x), self.stage.head_weight())[:, 0]


def accepted(texts: Texts, at: Tensor, chosen: Tensor) -> Tensor:
    """How many drafts each row [b] accepts: those at the positions `at` [b, 1 + n] behind the first that the model chooses itself. `chosen`
    [b, 1 + n]: its choices after each position.
    """
    same = (chosen[:, :-1] == texts.at(at[:, 1:])) & (at[:, 1:] >= 0)
    return same.cumprod(1).sum(1)
