"""AdamW and Lion over the local parts of the weights; config/optimizers.py has the rows of all. Muon is in muon.py.

Elementwise rules need no other rank's numbers, so they run on plain local tensors that share the parameters' memory. A step takes the
gradients' factor and whether they are finite as device tensors: a bad step changes nothing, without a host synchronization.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megascale.comm.mesh import Mesh
from megascale.config.optimizers import OptimizerRow, optimizers, scales_of
from megascale.config.schema import Optim
from megascale.errors import UsageError
from megascale.model.spec import MATRICES
from megascale.optim.averages import Averaged
from megascale.optim.host import Mirror, OnHost
from megascale.optim.moments import moment_of
from megascale.optim.optimizer import Optimizer
from megascale.optim.rates import Rate, grouped_by_rate, rate_of
from megascale.optim.runs import RUN, in_runs
from megascale.parallel.model import ParallelModel, Weight
from megascale.plugins import resolve


def build_optimizer(model: ParallelModel, cfg: Optim, offload: tuple[str, ...] = (), tokens: int = 1) -> Optimizer:
    """`offload` as in the config: "optimizer" puts the state into host memory; with "parameters" the weights already are there. `tokens`:
    how many a step has, for averages with half-lives in tokens.
    """
    if "parameters" in offload:
        return OnHost(optimizer_over(model.weights, model, cfg, tokens), None)
    if "optimizer" in offload:
        mirror = Mirror(model.weights)
        return OnHost(optimizer_over(mirror.weights, model, cfg, tokens), mirror)
    return optimizer_over(model.weights, model, cfg, tokens)


def optimizer_over(weights: list[Weight], model: ParallelModel, cfg: Optim, tokens: int = 1) -> Optimizer:
    """The optimizer of `cfg` for some weights of the model, on their device, with the averages that follow it."""
    own = _own_optimizer(weights, model, cfg)
    return Averaged(own, weights, cfg.ema, tokens) if cfg.ema else own


def _own_optimizer(weights: list[Weight], model: ParallelModel, cfg: Optim) -> Optimizer:
    rates = {w.name: rate_of(w.placement.spec, cfg, model.model.cfg, w.name) for w in weights}
    trained = _by_row([w for w in weights if not rates[w.name].frozen], cfg, rates, model.mesh)
    frozen = [w for w in weights if rates[w.name].frozen]
    return Partly(trained, _by_row(frozen, cfg, rates, model.mesh)) if frozen else trained


def _by_row(weights: list[Weight], cfg: Optim, rates: Mapping[str, Rate], mesh: Mesh) -> Optimizer:
    row = optimizers()[cfg.name]
    if row.rest is None:
        return _build(cfg.name, weights, cfg, rates, mesh)
    others = [w for w in weights if w.placement.spec.role not in MATRICES]
    hidden = [w for w in weights if w.placement.spec.role in MATRICES]
    return Together(_build(row.rest, others, cfg, rates, mesh), _build(cfg.name, hidden, cfg, rates, mesh))


def _build(name: str, weights: list[Weight], cfg: Optim, rates: Mapping[str, Rate], mesh: Mesh) -> Optimizer:
    """Builds an optimizer from its row. Raises UsageError if its state is not what the row says."""
    row = optimizers()[name]
    made: Optimizer = resolve(row.build, f"the optimizer {name}")(weights, cfg, rates, mesh)
    state = made.state()
    expected = {*row.state, *row.rows, *row.counts, *row.sums}
    if set(state) - (scales_of(row) if cfg.moments == "int8" else set()) != expected:
        raise UsageError(f"the optimizer {name} keeps {_words(state)} but its row says {_words(expected)}: make the row say what it keeps")
    for w in weights:
        for key in expected:
            tensors, shape = state[key], _shape(row, key, w)
            found = list(tensors[w.name].shape) if w.name in tensors else shape
            if found != shape:
                raise UsageError(f"the optimizer {name} keeps {key} of {w.name} as {found}, but its row says {shape}: correct one of them")
    return made


def _shape(row: OptimizerRow, key: str, w: Weight) -> list[int]:
    if key in row.state:
        return list(w.local.shape)
    return [*w.local.shape[:-1], 1] if key in row.rows else []


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
        return _merged(self.second, self.first)


class Partly:
    """An optimizer of some weights, and one of frozen ones that keeps its state and takes no step."""

    def __init__(self, trained: Optimizer, frozen: Optimizer) -> None:
        self.trained, self.frozen = trained, frozen

    def step(self, lr: float, factor: Tensor, finite: Tensor) -> None:
        self.trained.step(lr, factor, finite)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return _merged(self.trained, self.frozen)


def _merged(*parts: Optimizer) -> dict[str, dict[str, Tensor]]:
    merged: dict[str, dict[str, Tensor]] = {}
    for part in parts:
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
        self.exp_avg = {w.name: moment_of(w, cfg.moments, signed=True) for w in self.weights}
        self.exp_avg_sq = {w.name: moment_of(w, cfg.moments, signed=False) for w in self.weights}
        # Opened moments need memory of their own.
        self.run = RUN if cfg.moments is not None else sum(x.numel() for x in self.locals.values())

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, finite: Tensor) -> None:
        """Calls torch's functional form, since its class imports the compiler."""
        divisor = None
        if divided_in_kernel(self.weights):
            divisor = factor.to(torch.float32).reciprocal()
        else:
            scale_gradients(self.weights, factor)
        grads = {w.name: grad for w in self.weights if (grad := w.local_grad) is not None}
        skip = (~finite).to(torch.float32)
        by_name = {w.name: w for w in self.weights}
        for group in self.groups:
            for weights in in_runs([by_name[n] for n in group["params"] if n in grads], self.run):
                names = [w.name for w in weights]
                first, second = [self.exp_avg[n].open() for n in names], [self.exp_avg_sq[n].open() for n in names]
                adamw(
                    [self.locals[n] for n in names],
                    [grads[n] for n in names],
                    first,
                    second,
                    max_exp_avg_sqs=[],
                    state_steps=[self.steps[n] for n in names],
                    fused=True,
                    grad_scale=divisor,
                    found_inf=skip,
                    amsgrad=False,
                    beta1=self.betas[0],
                    beta2=self.betas[1],
                    lr=lr * group["factor"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                torch.autograd.graph.increment_version([self.locals[n] for n in names])  # the fused kernel leaves it to others
                for name, m, v in zip(names, first, second):
                    self.exp_avg[name].close(m)
                    self.exp_avg_sq[name].close(v)

    def state(self) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {"step": self.steps, "exp_avg": {}, "exp_avg_sq": {}}
        for key, moments in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            for name, moment in moments.items():
                for suffix, tensor in moment.tensors.items():
                    found.setdefault(key + suffix, {})[name] = tensor
        return found


class Lion:
    """p ← p − lr·(sign(β₁m + (1−β₁)g) + wd·p), then m ← β₂m + (1−β₂)g (arXiv 2302.06675). A few kernels for many weights at once."""

    def __init__(self, weights: list[Weight], cfg: Optim, rates: Mapping[str, Rate], mesh: Mesh) -> None:
        self.weights, self.cfg, self.rates = [w for w in weights if w.local.numel() > 0], cfg, rates
        self.exp_avg = {w.name: torch.zeros_like(w.local) for w in self.weights}

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, finite: Tensor) -> None:
        scale_gradients(self.weights, factor)
        grads = {w.name: torch.where(finite, g, torch.zeros_like(g)) for w in self.weights if (g := w.local_grad) is not None}
        for rate in dict.fromkeys(self.rates[w.name] for w in self.weights):
            alike = [w for w in self.weights if self.rates[w.name] == rate and w.name in grads]
            for some in in_runs(alike, RUN):
                self._update(some, [grads.pop(w.name) for w in some], rate, lr, finite)

    def _update(self, weights: list[Weight], grads: list[Tensor], rate: Rate, lr: float, finite: Tensor) -> None:
        own, averages = [w.local for w in weights], [self.exp_avg[w.name] for w in weights]
        go = finite.to(own[0].dtype)
        updates = torch._foreach_lerp(grads, averages, self.cfg.betas[0])
        torch._foreach_sign_(updates)
        torch._foreach_add_(updates, own, alpha=rate.decay)
        torch._foreach_mul_(updates, lr * rate.factor * go)
        torch._foreach_sub_(own, updates)
        torch._foreach_sub_(grads, averages)
        torch._foreach_mul_(grads, (1 - self.cfg.betas[1]) * go)
        torch._foreach_add_(averages, grads)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"exp_avg": self.exp_avg}


def divided_in_kernel(weights: list[Weight]) -> bool:
    """Whether the fused kernel scales gradients, which saves a pass over them. It divides by a number in fp32, so a product may round
    otherwise: on CPUs, and for fp64, gradients are multiplied as ever.
    """
    return bool(weights) and weights[0].local.is_cuda and weights[0].local.dtype != torch.float64


def scale_gradients(weights: list[Weight], factor: Tensor) -> None:
    grads = [g for w in weights if (g := w.local_grad) is not None and g.numel() > 0]
    if grads:
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))
