"""Depth-first accumulation: each micro-batch goes all the way forward and back before the next one starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megascale.data.loader import Batch
from megascale.model.loss import one_for
from megascale.parallel.model import ParallelModel


class Schedule(Protocol):
    """Turns micro-batches into gradients, in any order. Calls `Traffic.micro_batch` wherever all ranks may leave together."""

    def run(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """Forward and backward of all micro-batches; the weights then hold gradients summed over the global batch.

        Returns this rank's loss summed over its valid targets, times `scale`; 0-dim, detached; zero without the head.
        """

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """The loss summed over the batches' valid targets, without gradients; zero without the head."""


class Accumulation:
    def __init__(self, model: ParallelModel) -> None:
        self.model = model

    def run(self, batches: Sequence[Batch], scale: float) -> Tensor:
        total: Tensor | None = None
        for i, batch in enumerate(batches):
            self.model.mesh.traffic.micro_batch()
            with self.model.micro_batch(i == len(batches) - 1):
                loss = self.model.module(**batch.inputs(), scale=scale)
                loss.backward(one_for(loss))
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        self.model.finish_gradients()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        losses = []
        for batch in batches:
            self.model.mesh.traffic.micro_batch()
            losses.append(self.model.module(**batch.inputs(training=False)))
        return torch.stack(losses).to(torch.float64).sum()
