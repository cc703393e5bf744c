"""Skips steps whose loss or gradient norm is far above those of the steps before, decided on the device without waiting for the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megascale.config.schema.train import SkipSpikes

FLOOR = 1e-3  # smallest standard deviation, as a share of the mean: steps that are nearly equal are no reason to skip the next one


class SpikeGate:
    """Decides which steps change the weights. The last `window` steps that did are compared with; before there are so many, every finite
    step does. Losses and norms are the same on every layout up to rounding, and so are decisions.

    After `in_a_row` skipped steps the next one is taken, and the window begins anew: the level has changed, and waiting would not help.
    """

    def __init__(self, cfg: SkipSpikes, device: torch.device) -> None:
        self.cfg = cfg
        self.places = torch.arange(cfg.window, device=device)
        self.window = torch.zeros(2, cfg.window, dtype=torch.float64, device=device)  # losses and norms
        self.taken, self.skipped = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))

    @torch.no_grad()
    def passes(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a step with this loss and gradient norm (0-dim) changes the weights. 0-dim, bool."""
        now = torch.stack([loss.to(torch.float64), norm.to(torch.float64)])
        finite = torch.isfinite(now).all()
        mean = self.window.mean(1)
        spread = torch.maximum(self.window.std(1), FLOOR * mean.abs())
        spike = finite & (self.taken >= self.cfg.window) & (now > mean + self.cfg.sigma * spread).any()
        anew = spike & (self.skipped >= self.cfg.in_a_row)
        takes = finite & (~spike | anew)
        self.taken = torch.where(anew, 0, self.taken)
        here = (self.places == self.taken % self.cfg.window) & takes
        self.window = torch.where(here, now.unsqueeze(1), self.window)
        self.taken = self.taken + takes
        self.skipped = torch.where(takes, 0, self.skipped + (spike & ~anew))
        return takes

    def plain(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values. Waits for the device."""
        losses, norms = self.window.tolist()
        return {"losses": losses, "norms": norms, "taken": self.taken.item(), "skipped": self.skipped.item()}

    def load(self, plain: dict[str, Any]) -> None:
        """Continues from what a checkpoint kept; a window of another length begins anew."""
        if len(plain["losses"]) != self.cfg.window:
            return
        self.window.copy_(torch.tensor([plain["losses"], plain["norms"]], dtype=torch.float64))
        self.taken.fill_(plain["taken"])
        self.skipped.fill_(plain["skipped"])
