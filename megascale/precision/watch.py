"""Losses of FP8 casts: the share of numbers that become zero, and the share beyond the largest one. Measured on a few steps only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from megascale.config.schema import Config

CAST = ("input", "weight", "gradient")  # casts of each product
LOST = ("vanished", "clamped")
SUMS = {f"{cast}_{what}": 1 for cast in CAST for what in (*LOST, "numbers")}

# Beyond these shares a reading is worth a warning. GELU's zeros are harmless up to about a third (arXiv 2502.05967, section 4).
LIMITS = {"input_vanished": 0.5, "weight_vanished": 0.05, "gradient_vanished": 0.2} | dict.fromkeys((f"{c}_clamped" for c in CAST), 1e-3)
KNOBS = {
    "input_vanished": "try model.ffn relu or gelu, or a larger model.mus_tau",
    "weight_vanished": "lower optim.weight_decay",
    "gradient_vanished": "raise precision.loss_scale",
    "input_clamped": "lower optim.lr or model.mus_tau",
    "weight_clamped": "raise optim.weight_decay or lower optim.lr",
    "gradient_clamped": "lower precision.loss_scale",
}


def sampled_step(step: int, config: Config) -> bool:
    """Whether casts are measured: on the first step, and about every `precision.fp8_watch` steps, when a row is logged."""
    every, logged = config.precision.fp8_watch, config.train.log_every
    if config.precision.fp8 != "static" or every == 0:
        return False
    return step == 1 or step % (-(-every // logged) * logged) == 0


def shares(totals: dict[str, Tensor]) -> dict[str, float]:
    """Counts over all ranks → shares. As ratios of sums they do not change under recomputation, which casts twice."""
    return {f"{c}_{lost}": float(totals[f"{c}_{lost}"]) / max(1.0, float(totals[f"{c}_numbers"])) for c in CAST for lost in LOST}


def warnings(row: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """A row of readings, one per module → a warning for each kind of loss that is too large, about its worst module."""
    found = {}
    for reading, limit in LIMITS.items():
        values = row[reading]
        worst = max(range(len(values)), key=lambda i: values[i])
        if values[worst] > limit:
            cast, lost = reading.split("_")
            found[reading] = (
                f"{values[worst]:.1%} of the {cast} of layer {row['layers'][worst]}'s {row['parts'][worst]} {lost} in FP8 "
                f"(up to {limit:.1%} is usual): {KNOBS[reading]}"
            )
    return found
