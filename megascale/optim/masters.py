"""Finds stored weights that are too coarse to change: updates below half the spacing of numbers are rounded away."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megascale.config.optimizers import optimizers
from megascale.config.schema import Config, Model, Optim
from megascale.model.spec import ParamSpec
from megascale.optim.rates import rate_of

PLACES = 8  # significant bits of a bf16 number


def smallest_step(size: float) -> float:
    """The smallest change of a bf16 number of this size that is not rounded away, in the direction of denser numbers."""
    mantissa, exponent = math.frexp(size)  # size = mantissa·2^exponent, mantissa from ½ to 1
    return 2.0 ** (exponent - PLACES - (2 if mantissa == 0.5 else 1))


def immovable(specs: Mapping[str, ParamSpec], optim: Optim, model: Model) -> dict[str, float]:
    """Weight → smallest possible change of its initial value in bf16, for weights whose update at the peak rate is smaller.

    An update of a scale-free optimizer is about as large as the rate. A weight starts at its mean, else around its standard deviation; from
    zero any change is possible.
    """
    found = {}
    for name, spec in specs.items():
        size = abs(spec.mean) or spec.std
        rate = rate_of(spec, optim, model, name)
        if size > 0 and not rate.frozen and optim.lr * rate.factor <= smallest_step(size):
            found[name] = smallest_step(size)
    return found


def immovable_note(config: Config, specs: Mapping[str, ParamSpec]) -> str | None:
    """A warning if masters are bf16 and some of them cannot change."""
    if config.precision.storage != "bf16" or not optimizers()[config.optim.name].scale_free:
        return None
    found = immovable(specs, config.optim, config.model)
    if not found:
        return None
    worst = max(found, key=lambda name: found[name])
    size = abs(specs[worst].mean) or specs[worst].std
    return (
        f"precision.master is bf16 and optim.lr is {config.optim.lr:g}: {len(found)} of {len(specs)} weights cannot move, such as {worst}, "
        f"whose entries start at about {size:g} and round away every step up to {found[worst]:.2g}; set precision.master fp32, or raise "
        "the rate"
    )
