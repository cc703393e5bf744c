"""Coordinate checks: how far a few steps move activations, by width and depth (μP, arXiv 2203.03466, appendix D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megascale.train.build import build_engine
from megascale.train.engines.engine import backward, update
from tests.layouts import CPU, Case, build, fake_batch

BATCH = 8


def moved(case: Case) -> dict[str, float]:
    """RMS of the change of the first and the last block's output and of the logits over the case's steps, all on one batch."""
    model = build(case, 1)
    engine, batch = build_engine(model, case.config, CPU), fake_batch(case, list(range(BATCH)))
    blocks = [block for _, block in model.model.units()]
    before = _look(model.model, blocks, batch)
    for _ in range(case.steps):
        update(engine, backward(engine, [batch], 1 / batch.valid, case.optim.lr))
    after = _look(model.model, blocks, batch)
    return {name: float((after[name] - x).square().mean().sqrt()) for name, x in before.items()}


def _look(model: Any, blocks: list[Any], batch: Any) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            seen[name] = output.detach().clone()

        return hook

    handles = [blocks[0].register_forward_hook(note("first")), blocks[-1].register_forward_hook(note("last"))]
    with torch.no_grad():
        seen["logits"] = model(batch.tokens)
    for handle in handles:
        handle.remove()
    return seen
