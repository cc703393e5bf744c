"""The learning rate and the decay of a weight, by its role and the model's width."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from megascale.config.schema import Group, Optim, any_layer
from megascale.errors import UsageError
from megascale.model.spec import MATRICES, ParamSpec


class Rate(NamedTuple):
    """A weight's rate is `factor` times the schedule's; an update first multiplies it by 1 − rate·`decay`. `eps`: factor on epsilon.
    `frozen`: there is no update.
    """

    factor: float
    decay: float
    eps: float = 1.0
    frozen: bool = False


def rate_of(spec: ParamSpec, cfg: Optim, width: int, name: str = "") -> Rate:
    """The rate of the weight `name` in a model of hidden size `width`; `optim.multipliers` may list the name.

    With `base_width` hidden matrices use √(base_width/width) of the rate (μS, arXiv 2502.05967). With `independent_decay` every update
    multiplies a weight by 1 − weight_decay·lr/peak lr, whatever its rate. `optim.groups` counts last.
    """
    factor = math.sqrt(cfg.base_width / width) if cfg.base_width is not None and spec.role in (*MATRICES, "router", "head_gate") else 1.0
    group = group_of(cfg, name, spec)
    factor *= group.lr
    decay = 0.0
    if spec.decays:
        decay = cfg.weight_decay / (cfg.lr * factor) if cfg.independent_decay else cfg.weight_decay
    own = cfg.multiplier(name)
    return Rate(factor * own.lr, decay * own.weight_decay * group.weight_decay, own.eps * group.eps, bool(group.frozen))


def group_of(cfg: Optim, name: str, spec: ParamSpec) -> Group:
    """What the entries of `optim.groups` make of a weight together: factors multiply, the last `frozen` holds."""
    lr = weight_decay = eps = 1.0
    frozen = None
    for entry in cfg.groups:
        if _matches(entry, name, spec):
            lr, weight_decay, eps = lr * entry.lr, weight_decay * entry.weight_decay, eps * entry.eps
            frozen = frozen if entry.frozen is None else entry.frozen
    return Group(match=name, lr=lr, weight_decay=weight_decay, eps=eps, frozen=frozen)


def _matches(entry: Group, name: str, spec: ParamSpec) -> bool:
    return entry.match == spec.role or fnmatchcase(name, entry.match)


def check_names(cfg: Optim, specs: Mapping[str, ParamSpec]) -> None:
    """Raises UsageError for a key of `optim.multipliers` or an entry of `optim.groups` that no weight has, and if no weight is trained."""
    known = [*specs, *dict.fromkeys(any_layer(n) for n in specs)]
    for key in cfg.multipliers:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise UsageError(f"optim.multipliers names {key}, but no weight has that name{f'; did you mean {near[0]}?' if near else ''}")
    for number, entry in enumerate(cfg.groups):
        if not any(_matches(entry, name, spec) for name, spec in specs.items()):
            roles = list(dict.fromkeys(spec.role for spec in specs.values()))
            near = difflib.get_close_matches(entry.match, [*reversed(known), *roles], 3, 0.0)
            raise UsageError(
                f"optim.groups[{number}].match is {entry.match!r}, but no weight has such a name, nor that role; the nearest are "
                f"{', '.join(near)}"
            )
    if cfg.groups and all(group_of(cfg, name, spec).frozen for name, spec in specs.items()):
        raise UsageError(f"optim.groups freezes all {len(specs)} weights, so nothing would be trained: leave some of them out")


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
