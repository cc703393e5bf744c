"""The caches: an `Attend` that keeps the keys and values of earlier tokens, and a `Recall` that keeps the state they left.

Prompts of a batch are left-padded: padding has negative positions, to which nobody attends.

Shapes: b batch, h query heads and g KV heads here, n new tokens, t tokens so far with them, e head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megascale.config.schema import Model
from megascale.model.attention_delta import GatedDelta, HeadWeights, Streams, recall
from megascale.model.attention_latent import LatentAttention
from megascale.model.family import Family
from megascale.model.ops.attention_dense import dense_attention
from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.ops.delta_rule import Fold, scan
from megascale.model.ops.matmul import attention

# Distances (query − key) [b, n, t] → score biases [b, h here, n, t].
Bias = Callable[[Tensor], Tensor]
GROWTH = 256  # least number of tokens by which a cache grows
MASKED = 1 << 24  # most elements of a mask or of scores [b, 1 or h, n, t]: longer prompts are processed in parts


@dataclass
class CacheLayer:
    """Positions of a batch's tokens: `positions` [b, t] of all so far, of which `new` belong to the current pass, the `passes`-th.
    `expected`: least number of tokens in the end. `dropped` [b, n]: which tokens of the pass before this one nobody sees any more.
    """

    positions: Tensor
    expected: int = 0
    new: int = 0
    passes: int = 0
    dropped: Tensor | None = None
    _hidden: Tensor | None = None

    def add(self, positions: Tensor) -> None:
        """positions [b, n] of the tokens of the next pass."""
        self.dropped, self._hidden = self._hidden, None
        self.positions = torch.cat((self.positions, positions), 1)
        self.new = positions.shape[1]
        self.passes += 1

    def hide(self, positions: Tensor) -> None:
        """Takes the tokens at `positions` [b, n] out of what is kept, where they are not negative. An end that nobody sees is dropped."""
        gone = (self.positions[:, :, None] == positions[:, None]).any(-1)
        self.positions = self.positions.masked_fill(gone, -1)
        self._hidden = self.positions[:, gone.shape[1] - self.new :] < 0
        seen = (self.positions >= 0).any(0).nonzero()
        self.positions = self.positions[:, : int(seen[-1]) + 1 if len(seen) else 0]


@dataclass
class Rows:
    """A buffer [b, g, room, e] of the tokens so far."""

    data: Tensor | None = None

    def add(self, x: Tensor, end: int, expected: int) -> Tensor:
        """Puts x [b, g, n, e] before place `end`; returns all up to there [b, g, end, e]."""
        begin = end - x.shape[2]
        if self.data is None or self.data.shape[2] < end:
            wanted = max(end, expected, begin + begin // 4)  # grow geometrically, so that copies are rare
            more = x.new_empty((*x.shape[:2], -(-wanted // GROWTH) * GROWTH, x.shape[3]))
            if self.data is not None:
                more[:, :, :begin] = self.data[:, :, :begin]
            self.data = more
        self.data[:, :, begin:end] = x
        return self.data[:, :, :end]


@dataclass
class Remembering:
    """Attention of new tokens over all so far, for one module. If its weights repeat in depth, each repeat has its own buffer.

    bias  the score biases, if the positions have any
    one   values are the keys, which are kept once
    """

    place: CacheLayer
    window: int | None
    bias: Bias | None
    one: bool = False
    rows: list[tuple[Rows, Rows]] = field(default_factory=list)
    calls: int = 0
    passes: int = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
        """q [b, h, n, e], k and v [b, g, n, e] → [b, h, n, e]; the mask follows from positions, cap and sinks are those of `mask`."""
        self.calls = 0 if self.passes != self.place.passes else self.calls + 1
        self.passes = self.place.passes
        if self.calls == len(self.rows):
            self.rows.append((Rows(), Rows()))
        kept_keys, kept_values = self.rows[self.calls]
        end = self.place.positions.shape[1]
        keys = kept_keys.add(k, end, self.place.expected)
        values = keys if self.one else kept_values.add(v, end, self.place.expected)
        dense_mask = self._mask(q.dtype)
        if mask is not None and (mask.softcap is not None or mask.sinks is not None):
            return dense_attention(q, keys, values, dense_mask, mask.softcap, mask.sinks)
        if q.shape[1] != k.shape[1] and q.device.type == "cpu":
            repeat = q.shape[1] // k.shape[1]
            keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
        return attention(q, keys, values, dense_mask, grouped=q.shape[1] != keys.shape[1])

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """The mask [b, 1 or h, n, t] to add to scores."""
        key, query = self.place.positions[:, None, None, :], self.place.positions[:, None, -self.place.new :, None]
        hidden = (key > query) | (key < 0)
        if self.window is not None:
            hidden |= query - key >= self.window
        hidden &= query >= 0  # padding attends to anything, so that its softmax is finite; nobody reads it
        dense_mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, float("-inf"))
        return dense_mask if self.bias is None else dense_mask + self.bias((query - key)[:, 0]).to(dtype)


@dataclass
class RememberingState:
    """Linear attention of new tokens from the state that the earlier ones left, for one module: its size does not depend on their number.

    state   [b, n, r, K, V], None before the first token
    tail    the last tokens of the convolution's input, [b, w − 1, channels], None before the first token
    before  both before the latest pass, whose tokens are `latest`: a state cannot forget, so after some were hidden the others pass again
    hidden  in such a pass [b, n], which tokens are passed over
    """

    place: CacheLayer
    state: Tensor | None = None
    tail: Tensor | None = None
    before: tuple[Tensor | None, Tensor | None] = (None, None)
    latest: Streams | None = None
    hidden: Tensor | None = None

    def __call__(self, x: Streams, own: HeadWeights, mask: AttentionMask | None) -> Tensor:
        """Padding brings zeros, which leave the state of zeros as it is."""
        if self.latest is not None and self.place.dropped is not None:
            self.hidden, (self.state, self.tail) = self.place.dropped, self.before
            again = Streams(*self.latest[:3], *(_hidden_first(y, self.hidden) for y in self.latest[3:]))
            recall(again, own, None, self._ahead, self._scan)
            self.hidden = None
        real = (self.place.positions[:, -self.place.new :] >= 0).to(x.q.dtype)[..., None, None]
        self.before, self.latest = (self.state, self.tail), x._replace(q=x.q * real, k=x.k * real, v=x.v * real)
        return recall(self.latest, own, None, self._ahead, self._scan)

    def _ahead(self, x: Tensor, tokens: int) -> list[Tensor]:
        before = x.new_zeros(x.shape[0], tokens, x.shape[2]) if self.tail is None else self.tail
        joined = torch.cat((before, x), 1)
        if self.hidden is not None:  # the tail too moves next to the tokens that stay
            joined = _hidden_first(joined, torch.nn.functional.pad(self.hidden, (tokens, 0)))
        self.tail = joined[:, joined.shape[1] - tokens :].clone()
        return [joined]

    def _scan(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, age: Tensor | None) -> Tensor:
        if self.hidden is not None:  # a zero key writes nothing, and without decay nothing is forgotten
            first = _hidden_first(self.hidden, self.hidden)[..., None]
            k, g = k.masked_fill(first[..., None], 0.0), g.masked_fill(first, 0.0)
        out, _, (self.state,) = scan((q, k, v, g, beta), age, Fold.of([q.shape[1]]), lambda pieces, back: [self.state])
        return out


def _hidden_first(x: Tensor, hidden: Tensor) -> Tensor:
    """x [b, n, …] with each row's `hidden` [b, n] entries before the others."""
    order = (~hidden).to(torch.int8).argsort(dim=1, stable=True)
    return x.take_along_dim(order.view(*order.shape, *[1] * (x.ndim - 2)), 1)


def part_length(batch: int, heads: int, total: int) -> int:
    """Tokens per pass for prompts of `total`, so that a mask has at most MASKED elements; `heads`: those with their own masks or scores."""
    return max(1, MASKED // (batch * heads * total))


@contextmanager
def remembering(
    stage: Family, place: CacheLayer, bias_of: Callable[[Model], Bias | None], of_modules: Sequence[CacheLayer] = ()
) -> Iterator[None]:
    """Gives every attention of a stage a cache; restores all of them at the end, also after an error. `bias_of`: a layer's config → its
    score biases. `of_modules`: places of the modules of multi-token prediction.
    """
    own = {f"mtp.{k}.block": of for k, of in enumerate(of_modules)}
    units = [(name, unit.cfg, m) for name, unit in stage.units() for m in unit.modules() if hasattr(m, "attend")]
    before: list[tuple[Any, Any]] = [(m, m.attend) for *_, m in units]
    try:
        for name, cfg, module in units:
            latent = isinstance(module, LatentAttention) and module.absorbs
            at = own.get(name, place)
            if isinstance(module, GatedDelta):
                module.attend = RememberingState(at)
                continue
            module.attend = Remembering(at, cfg.sliding_window, bias_of(cfg), latent)  # type: ignore[assignment]
            if isinstance(module, LatentAttention):
                module.absorbed = latent
        yield
    finally:
        for *_, module in units:
            if isinstance(module, LatentAttention):
                module.absorbed = False
        for module, attend in before:
            module.attend = attend
