"""The interface of optimizers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Optimizer(Protocol):
    def step(self, lr: float, factor: Tensor, finite: Tensor) -> None:
        """One update with gradients × `factor`; nothing changes if `finite` (0-dim, bool) is false."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """state key → weight name → this rank's tensor: shaped like the weight's local part, or 0-dim. Live tensors, to save and to load
        into.
        """
