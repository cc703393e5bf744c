"""Optimizers as rows: what memory, growth, rules and engines ask of them. The classes are in optim/, and no torch is needed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megascale.errors import UsageError
from megascale.plugins import with_plugins


@dataclass(frozen=True)
class OptimizerRow:
    """One optimizer. The defaults promise nothing, so that what a row does not say is refused where it would matter.

    build           (weights, cfg, rates, mesh) → `optim.optimizer.Optimizer`, or "module:name" of that
    state           of each weight: key → the power of the gradient that the tensor follows (1: a mean of gradients, 2: one of squares),
                    by which growth scales it; None where no power does. A tensor has the weight's shape and dtype and starts at zero
    counts          keys of 0-dim fp32 numbers of updates, which a grown weight keeps
    rest            the optimizer of all weights but hidden matrices, where this one is for these alone (optim/rates.py: MATRICES)
    whole_matrices  an update needs whole matrices: too slow on a host, and not done in backward. Where False it is elementwise, so that
                    each rank updates its parts alone and every layout takes the same step
    scale_free      an update is about as large as the rate, however large gradients are: growth and bf16 masters count on it
    unit_scaling    a rate carries over to other widths under model.residual mus
    deepspeed       the engine deepspeed runs it: as torch's AdamW, so that no plugin's row may say so
    """

    build: str | Callable[..., Any]
    state: Mapping[str, int | None] = field(default_factory=dict)
    counts: tuple[str, ...] = ()
    rest: str | None = None
    whole_matrices: bool = False
    scale_free: bool = False
    unit_scaling: bool = False
    deepspeed: bool = False


OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw": OptimizerRow(
        "megascale.optim.optimizers:AdamW",
        state={"exp_avg": 1, "exp_avg_sq": 2},
        counts=("step",),
        scale_free=True,
        unit_scaling=True,
        deepspeed=True,
    ),
    "lion": OptimizerRow("megascale.optim.optimizers:Lion", state={"exp_avg": 1}, scale_free=True, unit_scaling=True),
    "muon": OptimizerRow("megascale.optim.optimizers:Muon", state={"momentum": 1}, rest="adamw", whole_matrices=True, scale_free=True),
}


def optimizers() -> Mapping[str, OptimizerRow]:
    found = with_plugins("optimizers", OPTIMIZERS, OptimizerRow)
    for name, row in found.items():
        if row.rest is not None and (row.rest not in found or found[row.rest].rest is not None):
            raise UsageError(f"the optimizer {name} leaves the rest of the weights to {row.rest}, which does not take them: name another")
        if row.deepspeed and name not in OPTIMIZERS:
            raise UsageError(f"the optimizer {name} of a plugin says deepspeed, and that engine runs AdamW: take deepspeed out of its row")
    return found


def rows_of(name: str) -> tuple[OptimizerRow, ...]:
    """An optimizer's row, and behind it that of the rest of the weights, if another one takes them."""
    row = optimizers()[name]
    return (row,) if row.rest is None else (row, optimizers()[row.rest])
