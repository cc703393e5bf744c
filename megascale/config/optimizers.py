"""Optimizers as rows: the facts that memory, growth, rules and engines need. The classes are in optim/. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megascale.errors import UsageError
from megascale.plugins import with_plugins


@dataclass(frozen=True)
class OptimizerRow:
    """One optimizer. The defaults promise nothing: a feature that depends on a fact the row does not state is refused.

    build           (weights, cfg, rates, mesh) → `optim.optimizer.Optimizer`, or its "module:name"
    state           per weight: key → power of the gradient that the tensor follows (1: a mean of gradients, 2: of squares), by which growth
                    scales it; 0: a difference of weights, which grows as they do; None if it follows no power. Tensors have the weight's
                    shape and dtype and start at zero
    rows            keys of one number for each row of a matrix, which growth cannot transform: shape [..., rows, 1]
    counts          keys of 0-dim fp32 update counters, which a grown weight keeps
    sums            keys of 0-dim fp64 sums over updates, likewise
    average         cfg → the `optim.averages.Average` that stands for the weights in evaluations and exports and takes the place of a
                    decay, or its "module:name"; None: the weights themselves do
    rest            optimizer of all other weights if this one only takes hidden matrices (optim/rates.py: MATRICES)
    whole_matrices  an update needs whole matrices: too slow on a host, and impossible in backward. If False, updates are elementwise, so
                    each rank updates its shards alone and every layout takes the same step
    scale_free      the size of an update follows the rate, not the gradients; growth and bf16 masters rely on it
    unit_scaling    learning rates transfer between widths under model.residual mus
    small_moments   its state may be kept in the formats of optim.moments
    muon            it orthogonalizes, and reads optim.muon
    deepspeed       the DeepSpeed engine can run it, as torch's AdamW; a plugin's row cannot say so
    """

    build: str | Callable[..., Any]
    state: Mapping[str, int | None] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    average: str | Callable[..., Any] | None = None
    rest: str | None = None
    whole_matrices: bool = False
    scale_free: bool = False
    unit_scaling: bool = False
    small_moments: bool = False
    muon: bool = False
    deepspeed: bool = False


ORTHOGONAL: dict[str, Any] = {"state": {"momentum": 1}, "rest": "adamw", "whole_matrices": True, "scale_free": True, "muon": True}
OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw": OptimizerRow(
        "megascale.optim.optimizers:AdamW",
        state={"exp_avg": 1, "exp_avg_sq": 2},
        counts=("step",),
        scale_free=True,
        unit_scaling=True,
        small_moments=True,
        deepspeed=True,
    ),
    "lion": OptimizerRow("megascale.optim.optimizers:Lion", state={"exp_avg": 1}, scale_free=True, unit_scaling=True),
    "muon": OptimizerRow("megascale.optim.muon:Muon", unit_scaling=True, **ORTHOGONAL),
    "normuon": OptimizerRow("megascale.optim.muon:NorMuon", rows=("row_sq",), **ORTHOGONAL),
    "schedule_free": OptimizerRow(
        "megascale.optim.schedule_free:ScheduleFree",
        state={"lead": 0, "exp_avg_sq": 2},
        counts=("step",),
        sums=("rates",),
        average="megascale.optim.schedule_free:evaluated",
        scale_free=True,
    ),
}


def optimizers() -> Mapping[str, OptimizerRow]:
    found = with_plugins("optimizers", OPTIMIZERS, OptimizerRow)
    for name, row in found.items():
        if row.rest is not None and (row.rest not in found or found[row.rest].rest is not None):
            raise UsageError(f"the optimizer {name} leaves the rest of the weights to {row.rest}, which cannot update them: name another")
        if row.deepspeed and name not in OPTIMIZERS:
            raise UsageError(f"the optimizer {name} of a plugin sets deepspeed, but that engine runs AdamW: remove it from the row")
    return found


def rows_of(name: str) -> tuple[OptimizerRow, ...]:
    """An optimizer's row, then the row of the optimizer for the other weights, if there is one."""
    row = optimizers()[name]
    return (row,) if row.rest is None else (row, optimizers()[row.rest])


def scales_of(row: OptimizerRow) -> set[str]:
    """Keys of the scales that an optimizer also keeps if its state is in 8 bits."""
    return {f"{key}_scale" for key in row.state}


BLOCK = 256  # most elements of an 8-bit state that share a scale


def block_of(columns: int) -> int:
    """Elements of a row that share a scale: the largest power of two that divides it, at most BLOCK."""
    return min(BLOCK, columns & -columns)


def state_bytes(
    name: str, moments: str | None, hidden: bool, columns: int, here: int, elements: int, itemsize: int, averages: int = 0
) -> int:
    """Bytes of state for `elements` of a weight with rows of `columns`, of which `here` are on this rank: tensors like the weight, in the
    format of `optim.moments`, numbers of rows, counts and sums. `hidden`: the weight is a hidden matrix; `averages`: how many of it are
    kept.
    """
    own = averages * (elements * max(itemsize, 4) + 8) if elements else 0
    first, *rest = rows_of(name)
    row = rest[0] if rest and not hidden else first
    scales, rows = 0, len(row.rows) * (elements // here if here else 0) * itemsize
    if row.small_moments and moments == "bf16":
        itemsize = 2
    elif row.small_moments and moments == "int8" and hidden:
        itemsize, scales = 1, 4 * (elements // block_of(columns))
    return len(row.state) * (elements * itemsize + scales) + rows + (4 * len(row.counts) + 8 * len(row.sums) if elements else 0) + own
