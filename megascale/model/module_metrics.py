"""Metrics of modules in a step, for metrics.jsonl: load of experts, underflow of a precision.

A module keeps its own `ModuleMetrics` and adds 0- and 1-dim tensors to it by name. Nothing is read until a step is logged, so the
host never waits. train/log/module_metrics.py finds them, sums them over ranks and turns them into a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megascale.rows import GROUPS

Totals = dict[str, Tensor]


@dataclass
class ModuleMetrics:
    """The metrics of one module.

    group    key of its readings in a row; each module of a group gives one number
    sampled  measured on a few steps only; rows of other steps omit the group
    sums     name → length of numbers that add up over micro-batches and ranks
    maxima   the same for maxima over them; never negative
    read     the totals of both over all ranks → named numbers. Ranks with the same tokens all add them, so only ratios are meaningful.
    """

    group: str
    sums: Mapping[str, int]
    maxima: Mapping[str, int]
    read: Callable[[Totals], dict[str, float]]
    sampled: bool = False
    totals: Totals = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.group in GROUPS, f"{self.group} is not in megascale.rows.GROUPS, which keeps the metrics of plugins from that name"

    @torch.no_grad()
    def add(self, name: str, value: Tensor) -> None:
        """Call from backward, or for idempotent values: recomputation repeats a forward pass.

        The first call is the same operation as later ones, with 0: selective recomputation refuses additional operations.
        """
        assert name in self.sums
        self.totals[name] = value + self.totals.get(name, 0)

    @torch.no_grad()
    def maximum(self, name: str, value: Tensor) -> None:
        assert name in self.maxima
        self.totals[name] = torch.maximum(self.totals.get(name, value), value)

    def flush(self) -> Totals:
        """The totals since the last call."""
        taken, self.totals = self.totals, {}
        return taken
