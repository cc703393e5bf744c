"""Metrics of modules over all ranks for one step (model/module_metrics.py), as one row: {group: {"layers", "parts", reading, …}}, lists
with one number per module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
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


Part = tuple[MetricSource, str, int]  # a module, the name of one of its metrics, and that metric's length


class MetricsOverRanks:
    """Built once by all ranks together. `flush` after every step is free. For logged steps the caller reduces `vectors` over ranks on the
    device, and `row` reads the result on the host.
    """

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

    def vectors(self, taken: dict[MetricSource, Totals], device: torch.device, sampled: bool) -> tuple[Tensor, Tensor]:
        """This rank's maxima and sums in fp64, zero for modules elsewhere. `sampled`: include modules that measure on sampled steps."""
        maxima, sums = (self._vector(taken, device, names) for names in self._names(sampled))
        return maxima, sums

    def row(self, told: Tensor, sampled: bool) -> dict[str, dict[str, list[Any]]]:
        """The reduced maxima and sums of all ranks, concatenated, as a row."""
        maxima, sums = self._names(sampled)
        known = {source: Totals() for source in self._who_told(sampled)}
        for (source, name, _), part in zip([*maxima, *sums], told.split([n for *_, n in [*maxima, *sums]])):
            known[source][name] = part
        row: dict[str, dict[str, list[Any]]] = {}
        for source, totals in known.items():
            group = row.setdefault(source.group, {"layers": [], "parts": []})
            group["layers"].append(source.layer)
            group["parts"].append(source.path)
            for name, number in source.read(totals).items():
                group.setdefault(name, []).append(number)
        return row

    def _who_told(self, sampled: bool) -> list[MetricSource]:
        return [s for s in self.all if sampled or not s.sampled]

    def _names(self, sampled: bool) -> tuple[list[Part], list[Part]]:
        """The entries of the maxima and of the sums, in order."""
        told = self._who_told(sampled)
        return [(s, *part) for s in told for part in s.maxima], [(s, *part) for s in told for part in s.sums]

    def _vector(self, taken: dict[MetricSource, Totals], device: torch.device, names: list[Part]) -> Tensor:
        empty: Totals = {}
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        own = [(taken.get(s, empty).get(name), n) for s, name, n in names]
        pieces = [zeros(n) if x is None else x.to(device, torch.float64).reshape(n) for x, n in own]
        return torch.cat([zeros(0), *pieces])


def _sources(model: ParallelModel) -> Iterable[tuple[MetricSource, ModuleMetrics]]:
    for stage in model.stages:
        for layer, part in stage.measured():
            for path, module in part.named_modules():
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
