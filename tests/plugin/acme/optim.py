"""Two optimizers of one tensor a weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megascale.comm.mesh import Mesh
from megascale.config.schema import Optim
from megascale.optim.rates import Rate
from megascale.parallel.model import Weight


class Signum:
    def __init__(self, weights: list[Weight], cfg: Optim, rates: Mapping[str, Rate], mesh: Mesh) -> None:
        self.weights, self.cfg, self.rates = weights, cfg, rates
        self.velocity = {w.name: torch.zeros_like(w.local) for w in weights}

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, finite: Tensor) -> None:
        for w in self.weights:
            v, rate, grad = self.velocity[w.name], self.rates[w.name], w.local_grad
            if grad is not None:
                moved = torch.lerp(grad * factor.to(v.dtype), v, self.cfg.betas[0])
                v.copy_(torch.where(finite, moved, v))
                update = self.direction(v) + rate.decay * w.local
                w.local.sub_(torch.where(finite, update * (lr * rate.factor), torch.zeros_like(v)))

    def direction(self, velocity: Tensor) -> Tensor:
        return velocity.sign()

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"velocity": self.velocity}


class HeavyBall(Signum):
    def direction(self, velocity: Tensor) -> Tensor:
        return velocity
