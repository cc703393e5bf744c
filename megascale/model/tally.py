"""Sums over groups of targets, such as those of a source, of a part of the sequence, or of an answer to score.

A batch may number the group of each of its targets. The stage with the head then adds what it knows about a target to its group, on the
device; nothing is read until somebody asks, and ranks that hold other targets of a group are summed by whoever reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass
class Tally:
    """Sums by group in fp64, [3, groups]: losses, targets, and targets that were not the likeliest token. With `adds` "tokens" the first
    are the likeliest tokens instead; a group must then have one target.
    """

    groups: int
    adds: Literal["losses", "tokens"] = "losses"
    sums: Tensor | None = None

    @torch.no_grad()
    def add(self, groups: Tensor, *numbers: Tensor) -> None:
        """groups [T], negative for targets without one; numbers [T] each."""
        if self.sums is None:
            self.sums = self.zeros(groups.device)
        where = torch.where(groups < 0, self.groups, groups)
        values = torch.stack([n.to(torch.float64) for n in numbers])
        self.sums[: len(numbers)].index_add_(1, where, values)

    def zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(3, self.groups + 1, dtype=torch.float64, device=device)

    def take(self, device: torch.device) -> Tensor:
        """The sums [3, groups] since the last call; zeros where no head is."""
        found = self.zeros(device) if self.sums is None else self.sums
        self.sums = None
        return found[:, : self.groups]
