"""The learning rate and the decay of a weight, by its role and the model's width."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from megascale.config.optimizers import optimizers
from megascale.config.schema import Group, Model, Muon, Optim, any_layer
from megascale.errors import UsageError
from megascale.model.spec import MATRICES, ParamSpec


class Rate(NamedTuple):
    """A weight's rate is `factor` times the schedule's; an update first multiplies it by 1 − rate·`decay`. `eps`: factor on epsilon.
    `frozen`: there is no update. `size`: factor on an orthogonal matrix at rate 1.
    """

    factor: float
    decay: float
    eps: float = 1.0
    frozen: bool = False
    size: float = 1.0


def rate_of(spec: ParamSpec, cfg: Optim, model: Model, name: str = "") -> Rate:
    """The rate of the weight `name` of a model; `optim.multipliers` may list the name.

    With `base_width` hidden matrices use √(base_width/width) of the rate under unit scaling (μS, arXiv 2502.05967), and base_width/width
    under `transfer.width`, where weights are smaller; epsilons there fall like gradients, and with the depth (CompleteP, table 1). With
    `independent_decay` every update multiplies a weight by 1 − weight_decay·lr/peak lr, whatever its rate. `optim.groups` counts last.
    """
    factor = 1.0
    if cfg.base_width is not None and model.residual_row.unit_scaled and follows_width(spec, cfg):
        factor = math.sqrt(cfg.base_width / model.hidden_size)
    weight_decay, size, eps = cfg.weight_decay, 1.0, 1.0
    if cfg.transfer_width is not None:
        wider = model.hidden_size / cfg.transfer_width
        eps /= wider
        if spec.role in (*MATRICES, "head_gate"):  # a step keeps as much of a weight: rate × decay is that of the base
            factor, weight_decay = factor / wider, weight_decay if cfg.independent_decay else weight_decay * wider
    if cfg.transfer_depth is not None and name.startswith("blocks."):
        eps *= cfg.transfer_depth / model.num_layers
    if orthogonalized(spec, cfg):
        own = cfg.orthogonal
        factor *= 1.0 if own.lr is None else own.lr / cfg.lr
        weight_decay = weight_decay if own.weight_decay is None else own.weight_decay
        size = step_size(own, spec.shape, model.residual_row.unit_scaled)
    group = group_of(cfg, name, spec)
    factor *= group.lr
    decay = 0.0
    if spec.decays:
        decay = weight_decay / (cfg.lr * factor) if cfg.independent_decay else weight_decay
    grown = cfg.multiplier(name)
    return Rate(factor * grown.lr, decay * grown.weight_decay * group.weight_decay, eps * grown.eps * group.eps, bool(group.frozen), size)


def step_size(settings: Muon, shape: Sequence[int], unit_scaled: bool) -> float:
    """The factor on an orthogonal matrix at rate 1.

    Under unit scaling a product divides by √columns. Weights there have unit variance, which is what `match_adamw` steps relative to; the
    other two say the effect on activations, so they multiply by √columns first.
    """
    rows, columns = shape[-2:]
    if settings.scale == "match_adamw":
        return 0.2 * float(max(rows, columns) ** 0.5)
    size = max(1.0, rows / columns) ** 0.5 if settings.scale == "spectral" else 1.0
    return size * columns**0.5 if unit_scaled else size


def orthogonalized(spec: ParamSpec, cfg: Optim) -> bool:
    return spec.role in MATRICES and optimizers()[cfg.name].muon


def follows_width(spec: ParamSpec, cfg: Optim) -> bool:
    """Whether `base_width` changes the rate under unit scaling. Updates of Adam line up, so their effect on activations grows with the
    width; orthogonal ones have the same in all directions.
    """
    return spec.role in (*MATRICES, "router", "head_gate") and not orthogonalized(spec, cfg)


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
