"""Averages of the weights: those of `optim.ema` beside any optimizer, and the one that an optimizer makes itself.

An average of which a step keeps the share d is debiased: after t steps it is Σ d^(t−i)·w_i ÷ Σ d^(t−i). Beside its values it keeps the
mass of what they are a mean of, (1−d)·Σ d^(t−i). A step makes the mass m ← d·m + (1−d) and moves the values by (1−d)/m of their distance
from the weights: the first step takes the weights themselves, and a weight that comes later starts at itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megascale.config.optimizers import optimizers
from megascale.config.schema import Ema, Optim
from megascale.config.schema.averages import MASS
from megascale.optim.optimizer import Optimizer
from megascale.optim.runs import RUN, in_runs
from megascale.parallel.model import ParallelModel, Weight
from megascale.plugins import resolve


class _Kept:
    """One average of some weights: its `values` by weight, in at least fp32, and the `mass` of each."""

    def __init__(self, weights: list[Weight], share: float) -> None:
        self.weights, self.share = weights, share
        self.values = {w.name: torch.zeros_like(w.local, dtype=wide(w.local.dtype)) for w in weights}
        device = weights[0].local.device if weights else None
        # Views of one tensor, so that a step makes all shares in a few kernels. Shares near 1 lose digits in fp32.
        self.masses = torch.zeros(len(weights), dtype=torch.float64, device=device)
        self.mass = dict(zip(self.values, self.masses.unbind()))

    def follow(self, finite: Tensor) -> None:
        grown = self.masses * self.share + (1 - self.share)
        moved = (1 - self.share) / grown * finite
        self.masses.copy_(torch.where(finite, grown, self.masses))
        shares = dict(zip(self.values, moved.unbind()))
        for some in in_runs(self.weights, RUN):
            values = [self.values[w.name] for w in some]
            weights = [w.local.to(x.dtype) for w, x in zip(some, values)]
            torch._foreach_lerp_(values, weights, [shares[w.name].to(x.dtype) for w, x in zip(some, values)])


class Averaged:
    """An optimizer whose updates some averages follow. Nothing moves on a step that is not finite, and the host waits for nothing."""

    def __init__(self, inner: Optimizer, weights: Sequence[Weight], averages: Sequence[Ema], tokens: int) -> None:
        """`tokens`: of a step, for half-lives in tokens."""
        self.inner = inner
        held = [w for w in weights if w.local.numel() > 0]
        self.kept = {average.key: _Kept(held, average.kept(tokens)) for average in averages}

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, finite: Tensor) -> None:
        self.inner.step(lr, factor, finite)
        for kept in self.kept.values():
            kept.follow(finite)

    def state(self) -> dict[str, dict[str, Tensor]]:
        found = dict(self.inner.state())
        for key, kept in self.kept.items():
            found |= {key: kept.values, key + MASS: kept.mass}
        return found


@dataclass(frozen=True)
class Average:
    """An average as plain data, which workers can pickle: the `keys` of the optimizer's state that it needs, and how a weight and these
    tensors, or the same rectangle of each, make its values. `name`: what metrics and commands call it; empty for an optimizer's own.
    """

    name: str
    keys: tuple[str, ...]
    of: Callable[..., Tensor]


def averages_of(optim: Optim) -> list[Average]:
    """The averages that a run with this section keeps beside its weights."""
    return [Average(average.name, (average.key, average.key + MASS), begun) for average in optim.ema]


def own_average(optim: Optim) -> Average | None:
    """The average that stands for the weights in evaluations and exports; None if they stand for themselves."""
    average = optimizers()[optim.name].average
    if average is None:
        return None
    made: Average = resolve(average, f"the average of the optimizer {optim.name}")(optim)
    return made


def begun(weight: Tensor, values: Tensor, mass: Tensor) -> Tensor:
    """The average once it has begun, and the weight before."""
    return torch.where(mass > 0, values, weight.to(values.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of an average: steps of 1 in 1000 of a distance are lost in bf16."""
    return torch.promote_types(dtype, torch.float32)


@contextmanager
@torch.no_grad()
def shown(model: ParallelModel, state: Mapping[str, Mapping[str, Tensor]], average: Average | None) -> Iterator[None]:
    """Inside the context the weights have the values of an average of the optimizer's `state`; after it, the same bits as before. None
    changes nothing. Needs memory for a copy of this rank's weights, which gradients left.
    """
    if average is None:
        yield
        return
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for w in model.weights:
            local = w.local
            if all(w.name in state.get(key, {}) for key in average.keys):
                parts = [state[key][w.name].to(local.device) for key in average.keys]
                kept.append((local, local.clone()))
                local.copy_(average.of(local, *parts))
        _gather_again(model)
        yield
    finally:
        for local, before in kept:
            local.copy_(before)
        _gather_again(model)


def _gather_again(model: ParallelModel) -> None:
    """After weights have changed: FSDP2 may hold some gathered from the last forward pass."""
    if any(w.sharded for w in model.weights):
        from megascale.parallel.data import forget_gathered  # imports FSDP2, which a single process does without

        forget_gathered(model.stages)
