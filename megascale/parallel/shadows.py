"""Gives weights that nothing gathers a copy in the compute dtype (model/shadow.py), and keeps the copies up to date."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megascale.comm.dtensor import is_dtensor
from megascale.model.experts import Bank
from megascale.model.family import Family
from megascale.model.layers import Linear
from megascale.model.spec import MATRICES
from megascale.model.tables import Table


def shadowed(stage: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a stage whose weight is wide and cast as it is, with the weight's name: hidden products, and vocabularies."""
    for path, layer in stage.named_modules():
        if isinstance(layer, Linear):
            cast = layer.fp8 == "false" and layer.statistics is None and layer.role in (*MATRICES, "head")
        else:
            cast = (isinstance(layer, Bank) and not layer.fp8) or (isinstance(layer, Table) and layer.vocabulary)
        if cast:
            yield f"{path}.weight", layer


class Shadows:
    """The shadows of one stage. They are written before the first forward pass after a weight has changed, which its version tells."""

    def __init__(self, stage: Family, device: torch.device) -> None:
        self.layers: list[Any] = []
        for _, layer in shadowed(stage):
            weight = layer.weight
            # On CPUs an expert's matrix is rounded when it is used, and a copy of the bank would cost more (grouped_matmul.py).
            looped = isinstance(layer, Bank) and device.type == "cpu"
            if not is_dtensor(weight) and weight.dtype != stage.shape.compute and not looped:
                layer.shadow = torch.empty(weight.shape, dtype=stage.shape.compute, device=device)
                self.layers.append(layer)
        self.written = [-1] * len(self.layers)
        if self.layers:
            stage.register_forward_pre_hook(lambda *_: self.write())

    @torch.no_grad()
    def write(self) -> None:
        versions = [layer.weight._version for layer in self.layers]
        stale: list[tuple[Tensor, Tensor]] = [
            (layer.shadow, layer.weight.detach()) for layer, now, then in zip(self.layers, versions, self.written) if now != then
        ]
        if stale:
            torch._foreach_copy_([shadow for shadow, _ in stale], [weight for _, weight in stale])
            self.written = versions
