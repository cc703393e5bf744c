"""AdamW, Lion and Muon over the local parts of the weights; config/optimizers.py has their rows.

Elementwise rules need no other rank's numbers, so they run on plain local tensors that share the parameters' memory. A step takes the
gradients' factor and whether they are finite as device tensors: a bad step changes nothing, without a host synchronization.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megascale.comm.mesh import Mesh
from megascale.config.optimizers import optimizers
from megascale.config.schema import Optim
from megascale.errors import UsageError
from megascale.model.ops.matmul import product
from megascale.optim.host import Mirror, OnHost
from megascale.optim.optimizer import Optimizer
from megascale.optim.owners import take_turns, work_shared
from megascale.optim.rates import MATRICES, Rate, grouped_by_rate, rate_of
from megascale.parallel.model import ParallelModel, Weight
from megascale.plugins import resolve


def build_optimizer(model: ParallelModel, cfg: Optim, offload: tuple[str, ...] = ()) -> Optimizer:
    """`offload` as in the config: "optimizer" puts the state into host memory; with "parameters" the weights already are there."""
    if "parameters" in offload:
        return OnHost(optimizer_over(model.weights, model, cfg), None)
    if "optimizer" in offload:
        mirror = Mirror(model.weights)
        return OnHost(optimizer_over(mirror.weights, model, cfg), mirror)
    return optimizer_over(model.weights, model, cfg)


def optimizer_over(weights: list[Weight], model: ParallelModel, cfg: Optim) -> Optimizer:
    """The optimizer of `cfg` for some weights of the model, on their device."""
    rates = {w.name: rate_of(w.placement.spec, cfg, model.model.cfg.hidden_size, w.name) for w in weights}
    row = optimizers()[cfg.name]
    hidden = [w for w in weights if w.placement.spec.role in MATRICES]
    own = _build(cfg.name, weights if row.rest is None else hidden, cfg, rates, model.mesh)
    if row.rest is None:
        return own
    others = [w for w in weights if w.placement.spec.role not in MATRICES]
    return Together(_build(row.rest, others, cfg, rates, model.mesh), own)


def _build(name: str, weights: list[Weight], cfg: Optim, rates: Mapping[str, Rate], mesh: Mesh) -> Optimizer:
    """Builds an optimizer from its row. Raises UsageError if its state is not what the row says."""
    row = optimizers()[name]
    made: Optimizer = resolve(row.build, f"the optimizer {name}")(weights, cfg, rates, mesh)
    state = made.state()
    expected = {*row.state, *row.counts}
    if set(state) != expected:
        raise UsageError(f"the optimizer {name} keeps {_words(state)} but its row says {_words(expected)}: make the row say what it keeps")
    for w in weights:
        for key, tensors in state.items():
            shape = list(w.local.shape) if key in row.state else []
            found = list(tensors[w.name].shape) if w.name in tensors else shape
            if found != shape:
                raise UsageError(f"the optimizer {name} keeps {key} of {w.name} as {found}, but its row says {shape}: correct one of them")
    return made


def _words(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys)) or "nothing"


class Together:
    """Two optimizers of different weights as one."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self.first, self.second = first, second

    def step(self, lr: float, factor: Tensor, finite: Tensor) -> None:
        self.first.step(lr, factor, finite)
        self.second.step(lr, factor, finite)

    def state(self) -> dict[str, dict[str, Tensor]]:
        merged: dict[str, dict[str, Tensor]] = {}
        for part in (self.second, self.first):
            for key, tensors in part.state().items():
                merged.setdefault(key, {}).update(tensors)
        return merged


class AdamW:
    """torch's fused AdamW: one kernel for all weights, on CUDA and on CPUs."""

    def __init__(self, weights: list[Weight], cfg: Optim, rates: Mapping[str, Rate], mesh: Mesh) -> None:
        self.weights = [w for w in weights if w.local.numel() > 0]
        self.locals = {w.name: w.local for w in self.weights}
        # By name, like the rates: a step leaves a weight without a gradient out of its group.
        self.groups, self.betas = grouped_by_rate({name: name for name in self.locals}, rates, cfg.eps), cfg.betas
        self.steps = {n: torch.zeros((), dtype=torch.float32, device=x.device) for n, x in self.locals.items()}
        self.exp_avg = {n: torch.zeros_like(x) for n, x in self.locals.items()}
        self.exp_avg_sq = {n: torch.zeros_like(x) for n, x in self.locals.items()}

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, finite: Tensor) -> None:
        """Calls torch's functional form, since its class imports the compiler."""
        scale_gradients(self.weights, factor)
        grads = {w.name: grad for w in self.weights if (grad := w.local_grad) is not None}
        for group in self.groups:
            names = [n for n in group["params"] if n in grads]
            adamw(
                [self.locals[n] for n in names],
                [grads[n] for n in names],
                [self.exp_avg[n] for n in names],
                [self.exp_avg_sq[n] for n in names],
                max_exp_avg_sqs=[],
                state_steps=[self.steps[n] for n in names],
                fused=True,
                found_inf=(~finite).to(torch.float32),
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr * group["factor"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"step": self.steps, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


class Lion:
    """p ← p − lr·(sign(β₁m + (1−β₁)g) + wd·p), then m ← β₂m + (1−β₂)g (arXiv 2302.06675)."""

    def __init__(self, weights: list[Weight], cfg: Optim, rates: Mapping[str, Rate], mesh: Mesh) -> None:
        self.weights, self.cfg, self.rates = [w for w in weights if w.local.numel() > 0], cfg, rates
        self.exp_avg = {w.name: torch.zeros_like(w.local) for w in self.weights}

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, finite: Tensor) -> None:
        scale_gradients(self.weights, factor)
        for w in self.weights:
            grad, local, m = w.local_grad, w.local, self.exp_avg[w.name]
            if grad is None:
                continue
            go = finite.to(local.dtype)
            grad = torch.where(finite, grad, torch.zeros_like(grad))
            rate = self.rates[w.name]
            update = torch.lerp(grad, m, self.cfg.betas[0]).sign_().add_(local, alpha=rate.decay)
            local.sub_(update * (lr * rate.factor * go))
            m.add_((grad - m) * ((1 - self.cfg.betas[1]) * go))

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"exp_avg": self.exp_avg}


class Muon:
    """Orthogonalized momentum, for hidden matrices.

    The rule is `torch.optim.Muon`'s (Nesterov momentum, five Newton–Schulz rounds, step sizes matched to AdamW's), which needs a whole
    matrix. If several ranks share a matrix, one of them, its owner, gathers the momentum, orthogonalizes it in the weight's own precision,
    so that every layout takes the same step, and sends the pieces back.
    """

    ROUNDS = 5
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, weights: list[Weight], cfg: Optim, rates: Mapping[str, Rate], mesh: Mesh) -> None:
        self.weights, self.cfg, self.rates = weights, cfg, rates
        self.momentum = {w.name: torch.zeros_like(w.local) for w in weights}
        self.turns = take_turns(weights, mesh, lambda w: orthogonalization_flops(w.placement.spec.shape))

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, finite: Tensor) -> None:
        scale_gradients(self.weights, factor)
        for turn in self.turns:
            pieces = [self._direction(m.weight, finite) for m in turn]
            updates = work_shared(turn, pieces, lambda x: orthogonalize(x, self.COEFFICIENTS, self.ROUNDS))
            for m, update in zip(turn, updates):
                local = m.weight.local
                go = finite.to(local.dtype)
                size = 0.2 * max(m.weight.placement.spec.shape[-2:]) ** 0.5
                rate = self.rates[m.weight.name]
                own = lr * rate.factor
                local.mul_(1 - own * rate.decay * go).sub_(update * (own * size * go))

    def _direction(self, w: Weight, finite: Tensor) -> Tensor:
        """Updates the weight's momentum and looks one step ahead (Nesterov)."""
        beta, m = self.cfg.betas[0], self.momentum[w.name]
        grad = torch.zeros_like(m) if w.local_grad is None else torch.where(finite, w.local_grad, torch.zeros_like(m))
        m.add_((grad - m) * ((1 - beta) * finite.to(m.dtype)))
        return torch.lerp(grad, m, beta)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"momentum": self.momentum}


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], rounds: int) -> Tensor:
    """The nearest matrix with equal singular values, roughly: Newton–Schulz rounds of X ← aX + b(XXᵀ)X + c(XXᵀ)²X. The last two dimensions
    are the matrix's.
    """
    a, b, c = coefficients
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        gram = product(x, x.mT)
        x = a * x + product(b * gram + product(c * gram, gram), x)
    return x.mT if tall else x


def orthogonalization_flops(shape: tuple[int, ...]) -> float:
    """FLOPs of one round, for matrices of `shape`: three products with the smaller side's Gram matrix."""
    small, large = sorted(shape[-2:])
    return math.prod(shape[:-2]) * (4.0 * small**2 * large + 2.0 * small**3)


def scale_gradients(weights: list[Weight], factor: Tensor) -> None:
    grads = [g for w in weights if (g := w.local_grad) is not None and g.numel() > 0]
    if grads:
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))
