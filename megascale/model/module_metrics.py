"""Numbers that modules tell of a step, for metrics.jsonl: how busy experts are, how often a precision underflows.

A module keeps a `ModuleMetrics` of its own and adds 0- and 1-dim tensors to it by name. Nothing is read until a step is logged, so the
host never waits. train/log/module_metrics.py finds them, sums them over ranks and turns them into a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Totals = dict[str, Tensor]


@dataclass
class ModuleMetrics:
    """What one module tells.

    group    under which its readings stand in a row; the modules of a group give one number each
    sampled  told on a few steps only; the rows of others leave the group out
    sums     name → length of what adds up over micro-batches and ranks
    maxima   the same for what is largest over them; never negative
    read     the totals of both over all ranks → named numbers. Ranks that see the same tokens all add them: only ratios mean something.
    """

    group: str
    sums: Mapping[str, int]
    maxima: Mapping[str, int]
    read: Callable[[Totals], dict[str, float]]
    sampled: bool = False
    totals: Totals = field(default_factory=dict)

    @torch.no_grad()
    def add(self, name: str, value: Tensor) -> None:
        """To be called from backward or for what is idempotent: recomputation repeats a forward pass.

        The first time is the same operation as any other, with 0: selective recomputation refuses to run more of them than it saw.
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
