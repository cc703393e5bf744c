"""Transforms optimizer state and step sizes so that a grown run takes the same steps as the source's would have.

A target element T = w·S with n copies that have equal gradients: S moves by one copy's, so g_T = g_S/(n·w). First moments are multiplied by
β = 1/(n·w), second moments by β²; AdamW then takes the source's steps if its epsilon is multiplied by β, its rate by w and its decay by
1/w, and a norm over all gradients is the source's if T's part counts 1/(√n·β) times.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from megascale.config.optimizers import rows_of
from megascale.config.schema import Multiplier, any_layer
from megascale.errors import UsageError
from megascale.expand.axes import MEAN, ZERO, AxisMap
from megascale.expand.plan import Growth
from megascale.expand.tensors import TensorPlan


def powers(optimizer: str) -> dict[str, int | None]:
    """The power of β for each tensor of an optimizer's state; 0 for a difference of weights."""
    rows = rows_of(optimizer)
    return {key: power for row in rows for key, power in row.state.items()} | {key: None for row in rows for key in row.rows}


def counts(optimizer: str) -> dict[str, torch.dtype]:
    """Keys of its state that count or sum over updates, with their dtypes."""
    rows = rows_of(optimizer)
    return {**{key: torch.float32 for row in rows for key in row.counts}, **{key: torch.float64 for row in rows for key in row.sums}}


def check_state_grows(optimizer: str, fate: str) -> None:
    """`fate` of the state: transform, reset or drop. Raises UsageError if the optimizer's row does not say how it grows."""
    unknown = [key for key, power in powers(optimizer).items() if power is None]
    if fate != "transform" or not (unknown or not all(row.scale_free for row in rows_of(optimizer))):
        return
    why = f"its row says no power of the gradient for {', '.join(unknown)}" if unknown else "its row does not say that it is scale_free"
    raise UsageError(
        f"optim.name is {optimizer} and its state is to be transformed: growth does not know how, since {why}; choose optimizer reset, "
        "which starts it fresh (tools/grow.py also has --optimizer drop), or complete the row if that is true of it"
    )


def state_axis(axis: AxisMap, power: int) -> AxisMap:
    """The map of a moment: β^power per element. New elements have no first moment; their second one is the mean of the others, since an
    element with v = 0 would take a far too large first step.
    """
    weight = np.divide(1.0, axis.copies * axis.weight, out=np.zeros_like(axis.weight), where=axis.weight != 0) ** power
    return AxisMap(axis.source, weight, axis.old).filled(MEAN if power == 2 else ZERO)


def state_plan(growth: Growth, power: int) -> Growth:
    """The growth of one kind of moment. Tensors of inserted layers and tensors without a source start at zero."""
    tensors = tuple(
        replace(t, source=None, drawn=None, axes=(), constant=0.0)
        if t.inserted or t.source is None
        else replace(t, scale=t.scale**-power, mean_by=None, offset=0.0)
        for t in growth.tensors
    )
    axes = {name: state_axis(a, power) for name, a in growth.axes.items()}
    return replace(growth, tensors=tensors, axes=axes, symmetry="none")


def multipliers(growth: Growth) -> tuple[dict[str, Multiplier], list[str]]:
    """Per name (blocks.*.… if all layers agree): factors on rate, decay, epsilon and the part of the gradient norm, for tensors with a
    factor other than one; and the names for which these are means over elements that differ.
    """
    found: dict[str, tuple[Multiplier, bool]] = {}
    for t in growth.tensors:
        if t.source is not None and t.drawn is None and not t.inserted and t.spec.role != "coefficient":
            found[t.name] = _multiplier(t, growth.axes_of(t))
    kinds: dict[str, set[Multiplier]] = {}
    for name, (m, _) in found.items():
        kinds.setdefault(any_layer(name), set()).add(m)
    result = {}
    for name, (m, _) in found.items():
        key = any_layer(name) if len(kinds[any_layer(name)]) == 1 else name
        if m != Multiplier():
            result[key] = m
    return result, sorted({any_layer(n) for n, (_, even) in found.items() if not even})


def _multiplier(plan: TensorPlan, axes: Iterable[AxisMap]) -> tuple[Multiplier, bool]:
    weight, beta, copies, even = plan.scale, 1 / plan.scale, 1.0, True
    for a in axes:
        w, n = np.abs(a.weight[a.known]), a.copies[a.known].astype(np.float64)
        some = w > 0
        w, n = w[some], n[some]
        if not len(w):
            continue
        even = even and bool(np.allclose(w, w[0]) and (n == n[0]).all() and some.all())
        weight *= _mean(w)
        beta /= _mean(w * n)
        copies *= _mean(n)
    rounded = [float(f"{x:.15g}") for x in (weight, 1 / weight, beta, 1 / (copies**0.5 * beta))]
    return Multiplier(lr=rounded[0], weight_decay=rounded[1], eps=rounded[2], norm=rounded[3]), even


def _mean(values: np.ndarray) -> float:
    return float(values[0]) if (values == values[0]).all() else float(np.exp(np.log(values).mean()))
