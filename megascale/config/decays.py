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

    factor       (optim, step, steps of the run) → factor on `optim.lr`, 1 at the peak; not called during the warm-up
    decay_steps  meaning of the key: the step at which the decay ends, the length of a final decay, or unused
    """

    factor: Callable[[Optim, int, int], float]
    decay_steps: Literal["end", "length", "unused"] = "unused"


def between(optim: Optim, share: float) -> float:
    """The factor that is `share` of the way up from `min_lr_ratio` to 1."""
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share


def done(optim: Optim, step: int, steps: int) -> float:
    """Progress from 0 to 1 of a decay that begins after the warm-up and ends at `decay_steps` (default: the last step)."""
    end = optim.decay_steps or steps
    return min(1.0, max(0.0, (step - optim.warmup_steps) / max(1, end - optim.warmup_steps)))


def length_of(optim: Optim, steps: int) -> int:
    """Length of a final decay: `decay_steps`, by default a tenth of the run."""
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
