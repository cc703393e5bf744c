"""Depth-first accumulation: each micro-batch goes all the way forward and back before the next one starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megascale.data.loader import Batch
from megascale.parallel.apply import ParallelModel


def run_micro_batches(model: ParallelModel, batches: Sequence[Batch], scale: float) -> Tensor:
    """Forward and backward of all micro-batches; gradients are left on the weights, summed over the global batch.

    Returns this rank's loss summed over its valid targets, times `scale`; 0-dim, detached.
    """
    total: Tensor | None = None
    for i, batch in enumerate(batches):
        with model.micro_batch(i == len(batches) - 1):
            loss = model.module(batch.tokens, batch.targets, batch.documents, batch.positions, batch.samples, scale=scale)
            loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    model.finish_gradients()
    return total


def forward_only(model: ParallelModel, batch: Batch) -> Tensor:
    """The loss summed over the batch's valid targets, without gradients."""
    with torch.no_grad():
        return model.module(batch.tokens, batch.targets, batch.documents, batch.positions)  # type: ignore[no-any-return]
