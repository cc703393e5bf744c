"""Metrics of modules over all ranks for one step (model/module_metrics.py), as one row: {group: {"layers", "parts", reading, …}}, lists
with one number per module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.comm.mesh import Mesh
from megascale.model.module_metrics import ModuleMetrics, Totals
from megascale.parallel.model import ParallelModel


@dataclass(frozen=True)
class MetricSource:
    """A module with metrics: its place in the model, which orders a row, and the lengths of its numbers."""

    group: str
    layer: int
    path: str
    sums: tuple[tuple[str, int], ...]
    maxima: tuple[tuple[str, int], ...]
    read: Callable[[Totals], dict[str, float]]
    sampled: bool


class MetricsOverRanks:
    """Built once by all ranks together. `flush` after every step is free, `row` is for logged steps."""

    def __init__(self, model: ParallelModel) -> None:
        self.mesh: Mesh = model.mesh
        self.here: dict[MetricSource, ModuleMetrics] = dict(_sources(model))
        known = [list(self.here)]
        if self.mesh["pp"].size > 1:
            known = [[] for _ in range(self.mesh["pp"].size)]
            dist.all_gather_object(known, list(self.here), group=self.mesh["pp"].group)
        self.all = sorted({s for part in known for s in part}, key=lambda s: (s.group, s.layer, s.path))

    def flush(self) -> dict[MetricSource, Totals]:
        return {source: metrics.flush() for source, metrics in self.here.items()}

    def row(self, taken: dict[MetricSource, Totals], device: torch.device, sampled: bool = False) -> dict[str, dict[str, list[Any]]]:
        """Collective over all ranks, two messages. `sampled`: also include the modules that measure only on sampled steps."""
        sources = [s for s in self.all if sampled or not s.sampled]
        sums = self._over_ranks([(s, s.sums) for s in sources], taken, device, dist.ReduceOp.SUM)
        maxima = self._over_ranks([(s, s.maxima) for s in sources], taken, device, dist.ReduceOp.MAX)
        row: dict[str, dict[str, list[Any]]] = {}
        for source in sources:
            group = row.setdefault(source.group, {"layers": [], "parts": []})
            group["layers"].append(source.layer)
            group["parts"].append(source.path)
            for name, number in source.read({**sums[source], **maxima[source]}).items():
                group.setdefault(name, []).append(number)
        return row

    def _over_ranks(
        self,
        parts: list[tuple[MetricSource, tuple[tuple[str, int], ...]]],
        taken: dict[MetricSource, Totals],
        device: torch.device,
        operation: Any,
    ) -> dict[MetricSource, Totals]:
        """Reduces one vector with all modules' numbers, zero for modules on other ranks, and splits it again on the host."""
        empty: Totals = {}
        flat_names = [(source, name, n) for source, names in parts for name, n in names]
        pieces = [taken.get(s, empty).get(name, torch.zeros(n)).to(device, torch.float64).reshape(n) for s, name, n in flat_names]
        if not pieces:
            return {source: {} for source, _ in parts}
        flat: Tensor = torch.cat(pieces)
        if self.mesh.size > 1:
            dist.all_reduce(flat, operation)
        split = iter(flat.cpu().split([n for *_, n in flat_names]))
        return {source: {name: next(split) for name, _ in names} for source, names in parts}


def _sources(model: ParallelModel) -> Iterable[tuple[MetricSource, ModuleMetrics]]:
    for stage in model.stages:
        for layer, (_, block) in zip(stage.part.layers, stage.units()):
            for path, module in block.named_modules():
                metrics = getattr(module, "metrics", None)
                if isinstance(metrics, ModuleMetrics):
                    yield (
                        MetricSource(
                            metrics.group,
                            layer,
                            path,
                            tuple(metrics.sums.items()),
                            tuple(metrics.maxima.items()),
                            metrics.read,
                            metrics.sampled,
                        ),
                        metrics,
                    )
