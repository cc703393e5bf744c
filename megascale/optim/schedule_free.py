"""Schedule-free AdamW (Defazio et al., arXiv 2405.15682, algorithm 1): an average of the weights takes the place of a decay.

Three sequences: z takes AdamW's steps, x is a mean of z, and gradients are taken at y = (1−β)z + βx, which the model's weights are. A run
is evaluated and exported at x. Beside y the state keeps the lead z − y, from which x = y − (1−β)/β·lead; a step with the update u of z and
the share c of the new z in x is

    y ← y + c·lead − (1 − β(1−c))·u        lead ← (1−c)(lead − β·u)

so that a lead of zero, as at the start or after a reset, means x = y = z.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from megascale.comm.mesh import Mesh
from megascale.config.schema import Optim
from megascale.optim.averages import Average
from megascale.optim.optimizers import scale_gradients
from megascale.optim.rates import Rate
from megascale.optim.runs import RUN, in_runs
from megascale.parallel.model import Weight

TINY = 1e-300  # of a sum of squared rates: the first step may have a rate of zero


class ScheduleFree:
    def __init__(self, weights: list[Weight], cfg: Optim, rates: Mapping[str, Rate], mesh: Mesh) -> None:
        self.weights, self.cfg, self.rates = [w for w in weights if w.local.numel() > 0], cfg, rates
        self.lead = {w.name: torch.zeros_like(w.local) for w in self.weights}
        self.exp_avg_sq = {w.name: torch.zeros_like(w.local) for w in self.weights}
        device = self.weights[0].local.device if self.weights else None
        # One number for each weight, since a grown model has some that are younger. The state has views of these.
        self.counted = torch.zeros(len(self.weights), dtype=torch.float32, device=device)
        self.summed = torch.zeros(len(self.weights), dtype=torch.float64, device=device)

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, finite: Tensor) -> None:
        scale_gradients(self.weights, factor)
        number = self.counted.to(torch.float64) + 1
        rate = lr * (1 - self.cfg.betas[1] ** number).sqrt()  # a weight's own factor cancels in its share
        total = self.summed + rate.square()
        share = rate.square() / total.clamp(min=TINY)
        numbers = {w.name: (r, c) for w, r, c in zip(self.weights, rate.unbind(), share.unbind())}
        for own in dict.fromkeys(self.rates[w.name] for w in self.weights):
            for some in in_runs([w for w in self.weights if self.rates[w.name] == own], RUN):
                self._update(some, own, [numbers[w.name] for w in some], finite)
        self.counted.add_(finite)
        self.summed.copy_(torch.where(finite, total, self.summed))

    def _update(self, weights: list[Weight], own: Rate, numbers: list[tuple[Tensor, Tensor]], finite: Tensor) -> None:
        """One step of weights with one rate. `numbers`: the step's rate and the share of each."""
        beta, second = self.cfg.betas
        y, lead, squares = [w.local for w in weights], [self.lead[w.name] for w in weights], [self.exp_avg_sq[w.name] for w in weights]
        go = finite.to(y[0].dtype)
        zeros = [torch.zeros_like(x) for x in y]
        grads = [zero if (g := w.local_grad) is None else torch.where(finite, g, zero) for w, zero in zip(weights, zeros)]
        moved = torch._foreach_mul(grads, grads)
        torch._foreach_sub_(moved, squares)
        torch._foreach_mul_(moved, (1 - second) * go)
        torch._foreach_add_(squares, moved)
        steps = torch._foreach_sqrt(squares)
        torch._foreach_add_(steps, self.cfg.eps * own.eps)
        torch._foreach_div_(grads, steps)
        torch._foreach_add_(grads, y, alpha=own.decay)
        rates, shares = ([x.to(go.dtype) for x in column] for column in zip(*numbers))
        torch._foreach_mul_(grads, [own.factor * r * go for r in rates])  # the update of z; nothing on a bad step
        torch._foreach_add_(y, torch._foreach_mul(lead, [c * go for c in shares]))
        torch._foreach_sub_(y, torch._foreach_mul(grads, [1 - beta * (1 - c) for c in shares]))
        torch._foreach_mul_(lead, [1 - c * go for c in shares])
        torch._foreach_sub_(lead, torch._foreach_mul(grads, [beta * (1 - c) for c in shares]))

    def state(self) -> dict[str, dict[str, Tensor]]:
        numbers = {"step": self.counted, "rates": self.summed}
        own = {key: {w.name: x for w, x in zip(self.weights, column.unbind())} for key, column in numbers.items()}
        return {"lead": self.lead, "exp_avg_sq": self.exp_avg_sq, **own}


def evaluated(cfg: Optim) -> Average:
    """The average x, at which a run is evaluated."""
    return Average("", ("lead",), partial(averaged, cfg.betas[0]))


def averaged(beta: float, y: Tensor, lead: Tensor) -> Tensor:
    return y - lead * ((1 - beta) / beta)
