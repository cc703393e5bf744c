"""The interface between models and passes: units, how the sequence may be split, and weights shared between stages."""

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
    """A block: the unit that passes wrap, recompute and compile. `attention` is its self-attention, `cfg` the config of its layer."""

    attention: Any
    cfg: Model

    @property
    def sublayers(self) -> list[Any]:
        """The sublayers that tensor parallelism splits. Each has an exchange before it, `enter`, and one after it, `leave`."""
        raise NotImplementedError


class Family(nn.Module):
    """A model, or the `part` of it that forms a pipeline stage. It is built on the meta device with unsharded shapes; passes shard it
    before memory is allocated.

    sequence       what context parallelism splits: the tokens of a sequence, or a grid along one of its dimensions
    shared_weight  the name of a weight that the first stage owns and the last one also uses; None without one
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

    def measured(self) -> Iterator[tuple[int, nn.Module]]:
        """Where modules with metrics are (module_metrics.py): the number of a layer, and its module."""
        for layer, (_, unit) in zip(self.part.layers, self.units()):
            yield layer, unit

    def joins(self) -> Iterator[Any]:
        """Modules whose method `joined` has a product between blocks; it is compiled like a block."""
        return iter(())

    @property
    def tail(self) -> list[nn.Module]:
        """The modules after the last block that share no weight with the rest, in the order in which they run."""
        return []

    def length_of(self, unit: str) -> int:
        """Length of the sequences in a unit."""
        return self.shape.seq_len

    def at_step(self, step: int) -> None:
        """Sets the global step, counted from 1, for parts that depend on it."""

    def stream_shapes(self, batch: torch.Size) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes of the stream [b, s, d] that this stage receives and sends, for a batch of tokens of this shape."""
        raise NotImplementedError
