"""How the learning rate falls after its warm-up, as rows: `optim.decay` names one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megascale.plugins import with_plugins

if TYPE_CHECKING:  # the section's own check asks for the names here
    from megascale.config.schema import Optim


@dataclass(frozen=True)
class DecayRow:
    """One decay.

    factor       (optim, step, steps of the run) → what `optim.lr` is multiplied with, 1 at the peak; not asked within the warm-up
    decay_steps  what the key means to it: the step where the decay ends, the length of a decay at the run's end, or nothing
    """

    factor: Callable[[Optim, int, int], float]
    decay_steps: Literal["end", "length", "unused"] = "unused"


def between(optim: Optim, share: float) -> float:
    """The factor that is `share` of the way up from `min_lr_ratio` to 1."""
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share


def done(optim: Optim, step: int, steps: int) -> float:
    """How much of a decay is over that begins behind the warm-up and ends at `decay_steps`, the last step if absent."""
    end = optim.decay_steps or steps
    return min(1.0, max(0.0, (step - optim.warmup_steps) / max(1, end - optim.warmup_steps)))


def length_of(optim: Optim, steps: int) -> int:
    """Of a decay at the run's end: `decay_steps`, a tenth of the run if absent."""
    return optim.decay_steps or max(1, steps // 10)


def _last_steps(optim: Optim, step: int, steps: int) -> float:
    length = length_of(optim, steps)
    return between(optim, 1 - min(1.0, max(0.0, (step - (steps - length)) / length)))


DECAYS: dict[str, DecayRow] = {
    "cosine": DecayRow(lambda o, step, steps: between(o, 0.5 * (1 + math.cos(math.pi * done(o, step, steps)))), "end"),
    "linear": DecayRow(lambda o, step, steps: between(o, 1 - done(o, step, steps)), "end"),
    "wsd": DecayRow(_last_steps, "length"),  # constant, then linear
    "constant": DecayRow(lambda o, step, steps: 1.0),
}


def decays() -> Mapping[str, DecayRow]:
    return with_plugins("decays", DECAYS, DecayRow)
