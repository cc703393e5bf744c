"""Keys and values that were computed once stay: an `Attend` that remembers what it has seen.

Prompts of a batch end together: shorter ones have padding before their first token, at negative positions, which nobody sees.

Shapes: b batch, h query heads and g KV heads here, n new tokens, t tokens so far with them, e head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.ops.matmul import attention

GROWTH = 256  # tokens by which a cache grows at least
MASKED = 1 << 24  # elements of a mask [b, 1 or h, n, t] made at once: longer prompts are read in parts


@dataclass
class CacheLayer:
    """Where the tokens of a batch stand: `positions` [b, t] of all so far, of which `new` are in the pass under way, the `passes`-th.
    `expected`: how many tokens there will be at least.
    """

    positions: Tensor
    expected: int = 0
    new: int = 0
    passes: int = 0

    def add(self, positions: Tensor) -> None:
        """positions [b, n] of the tokens of the next pass."""
        self.positions = torch.cat((self.positions, positions), 1)
        self.new = positions.shape[1]
        self.passes += 1


@dataclass
class Rows:
    """[b, g, room, e] of which the first `length` tokens are filled."""

    data: Tensor | None = None
    length: int = 0

    def add(self, x: Tensor, expected: int) -> Tensor:
        """x [b, g, n, e] → all so far [b, g, t, e]."""
        end = self.length + x.shape[2]
        if self.data is None or self.data.shape[2] < end:
            wanted = max(end, expected, self.length + self.length // 4)  # by a share, so that copies stay few
            more = x.new_empty((*x.shape[:2], -(-wanted // GROWTH) * GROWTH, x.shape[3]))
            if self.data is not None:
                more[:, :, : self.length] = self.data[:, :, : self.length]
            self.data = more
        self.data[:, :, self.length : end] = x
        self.length = end
        return self.data[:, :, :end]


@dataclass
class Remembering:
    """Attention of new tokens over all so far, for one module. Where its weights repeat in depth, each repeat has rows of its own.

    bias  of distances (query − key) [b, n, t] what is added to scores [b, h here, n, t], where positions do that
    """

    place: CacheLayer
    window: int | None
    bias: Callable[[Tensor], Tensor] | None
    rows: list[tuple[Rows, Rows]] = field(default_factory=list)
    calls: int = 0
    passes: int = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
        """q [b, h, n, e], k and v [b, g, n, e] → [b, h, n, e]; what is seen follows from positions."""
        self.calls = 0 if self.passes != self.place.passes else self.calls + 1
        self.passes = self.place.passes
        if self.calls == len(self.rows):
            self.rows.append((Rows(), Rows()))
        keys, values = (rows.add(x, self.place.expected) for rows, x in zip(self.rows[self.calls], (k, v)))
        if q.shape[1] != k.shape[1] and q.device.type == "cpu":
            repeat = q.shape[1] // k.shape[1]
            keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
        dense_mask = self._mask(q.dtype)
        return attention(q, keys, values, dense_mask, grouped=q.shape[1] != keys.shape[1])

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """[b, 1 or h, n, t] to add to scores."""
        key, query = self.place.positions[:, None, None, :], self.place.positions[:, None, -self.place.new :, None]
        hidden = (key > query) | (key < 0)
        if self.window is not None:
            hidden |= query - key >= self.window
        hidden &= query >= 0  # padding sees anything, so that its softmax is a number; nobody reads it
        dense_mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, float("-inf"))
        return dense_mask if self.bias is None else dense_mask + self.bias((query - key)[:, 0]).to(dtype)


def part_length(batch: int, heads: int, total: int) -> int:
    """How many tokens of prompts of `total` may be read at once, so that a mask keeps to MASKED elements; `heads` that differ in theirs."""
    return max(1, MASKED // (batch * heads * total))


@contextmanager
def remembering(stage: nn.Module, place: CacheLayer, window: int | None, bias: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Every attention of a stage has a cache inside; behind it all are as they were, whatever was raised."""
    before: list[tuple[Any, Any]] = [(m, m.attend) for m in stage.modules() if hasattr(m, "attend")]
    try:
        for module, _ in before:
            module.attend = Remembering(place, window, bias)
        yield
    finally:
        for module, attend in before:
            module.attend = attend
