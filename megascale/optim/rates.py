"""The learning rate and the decay of a weight, by its role and the model's width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from megascale.config.schema import Optim
from megascale.model.spec import MATRICES, ParamSpec


class Rate(NamedTuple):
    """A weight's rate is `factor` times the schedule's; an update first multiplies it by 1 − rate·`decay`. `eps`: factor on epsilon."""

    factor: float
    decay: float
    eps: float = 1.0


def rate_of(spec: ParamSpec, cfg: Optim, width: int, name: str = "") -> Rate:
    """The rate of the weight `name` in a model of hidden size `width`; `optim.multipliers` may list the name.

    With `base_width` hidden matrices use √(base_width/width) of the rate (μS, arXiv 2502.05967). With `independent_decay` every update
    multiplies a weight by 1 − weight_decay·lr/peak lr, whatever its rate.
    """
    factor = math.sqrt(cfg.base_width / width) if cfg.base_width is not None and spec.role in (*MATRICES, "router", "head_gate") else 1.0
    decay = 0.0
    if spec.decays:
        decay = cfg.weight_decay / (cfg.lr * factor) if cfg.independent_decay else cfg.weight_decay
    own = cfg.multiplier(name)
    return Rate(factor * own.lr, decay * own.weight_decay, own.eps)


def grouped_by_rate(parameters: Mapping[str, Any], rates: Mapping[str, Rate], eps: float) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: weights with one rate together, as `params`, `factor`, `weight_decay` and `eps`."""
    return [
        {
            "params": [p for name, p in parameters.items() if rates[name] == rate],
            "factor": rate.factor,
            "weight_decay": rate.decay,
            "eps": eps * rate.eps,
        }
        for rate in dict.fromkeys(rates[name] for name in parameters)
    ]
