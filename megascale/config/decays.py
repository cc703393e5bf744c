"""How the learning rate decays after its warm-up, as rows: `optim.decay` names one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megascale.plugins import with_plugins

if TYPE_CHECKING:  # the config section imports this file to check names
    from megascale.config.schema import Optim


@dataclass(frozen=True)
class DecayRow:
    """One decay.

    factor       (optim, step, steps of the schedule) → factor on `optim.lr`, 1 at the peak; not called during the warm-up
    decay_steps  meaning of the key: the step at which the decay ends, the length of a final decay, or unused
    """

    factor: Callable[[Optim, float, float], float]
    decay_steps: Literal["end", "length", "unused"] = "unused"


def between(optim: Optim, share: float) -> float:
    """The factor that is `share` of the way up from `min_lr_ratio` to 1."""
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share


def done(optim: Optim, step: float, steps: float) -> float:
    """Progress from 0 to 1 of a decay that begins after the warm-up and ends at `decay_steps` (default: the last step)."""
    end = optim.decay_steps or steps
    return min(1.0, max(0.0, (step - optim.warmup_steps) / max(1, end - optim.warmup_steps)))


def length_of(optim: Optim, steps: float) -> float:
    """Length of a final decay: `decay_steps`, by default a tenth of the run."""
    return optim.decay_steps or max(1, steps // 10)


# What is left of the way from `min_lr_ratio` to the peak, by progress from 0 to 1. Hägele et al. (arXiv 2405.18392) prefer 1 − √x.
SHAPES: dict[str, Callable[[Optim, float], float]] = {
    "cosine": lambda o, x: 0.5 * (1 + math.cos(math.pi * x)),
    "linear": lambda o, x: 1 - x,
    "1-sqrt": lambda o, x: 1 - math.sqrt(x),
    "power": lambda o, x: (1 - x) ** o.decay_power,
}


def _last_steps(optim: Optim, step: float, steps: float) -> float:
    length = length_of(optim, steps)
    return between(optim, SHAPES[optim.wsd_decay](optim, min(1.0, max(0.0, (step - (steps - length)) / length))))


def _whole(name: str) -> Callable[[Optim, float, float], float]:
    return lambda optim, step, steps: between(optim, SHAPES[name](optim, done(optim, step, steps)))


DECAYS: dict[str, DecayRow] = {
    **{name: DecayRow(_whole(name), "end") for name in SHAPES},
    "wsd": DecayRow(_last_steps, "length"),  # constant, then `wsd_decay`
    "constant": DecayRow(lambda o, step, steps: 1.0),
}


def decays() -> Mapping[str, DecayRow]:
    return with_plugins("decays", DECAYS, DecayRow)
