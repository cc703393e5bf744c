"""What a model tells the passes over it: its units, how its sequence may be cut, and which weights its stages share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from megascale.config.schema import Model
from megascale.config.stages import StagePart
from megascale.model.exchanges import Exchanges
from megascale.model.shape import Shape


class Unit(nn.Module):
    """What passes wrap, recompute and compile as one: a block. `attention` is where its own tokens meet."""

    attention: Any

    @property
    def sublayers(self) -> list[Any]:
        """The sublayers that a tensor rank has its part of. Each has an exchange before it, `enter`, and one behind it, `leave`."""
        raise NotImplementedError


class Family(nn.Module):
    """A model, or the `part` of it that makes a pipeline stage. It is built on the meta device with unsharded shapes; passes cut it before
    it gets memory.

    sequence       what is cut over context-parallel ranks: the tokens of a sequence, or a grid along one of its dimensions
    shared_weight  the name of a weight that the first stage owns and the last one uses, too; None where there is none
    """

    cfg: Model
    shape: Shape
    part: StagePart
    exchanges: Exchanges
    sequence: Literal["tokens", "grid"]
    shared_weight: str | None = None

    def units(self) -> Iterator[tuple[str, Unit]]:
        """The blocks with their names."""
        raise NotImplementedError

    def length_of(self, unit: str) -> int:
        """How long the sequences are that a unit works on."""
        return self.shape.seq_len

    def at_step(self, step: int) -> None:
        """Sets the global step, counted from 1, for what follows it."""

    def stream_shapes(self, batch: torch.Size) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes of the stream [b, s, d] that this stage takes and that it gives on, for a batch of tokens of this shape."""
        raise NotImplementedError
