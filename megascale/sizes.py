"""Counts, bytes, work and time as a person would write them. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

NONE = "–"  # for a missing number

Units = Sequence[tuple[float, str]]
COUNTS: Units = ((1e3, "K"), (1e6, "M"), (1e9, "B"), (1e12, "T"))
BYTES: Units = ((1.0, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB"))
WORK: Units = ((1.0, "FLOP"), (1e6, "MFLOP"), (1e9, "GFLOP"), (1e12, "TFLOP"), (1e15, "PFLOP"), (1e18, "EFLOP"))


def count_words(value: float) -> str:
    """A count, from 10,000 on in thousands, millions, billions or trillions: 46,702,792,704 → "46.7B"."""
    if not math.isfinite(value):
        return NONE
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    scale, unit = _unit(value, COUNTS)
    return f"{value / scale:,.1f}{unit}"


def model_words(parameters: int, active: int) -> str:
    """ "46.7B parameters, 12.9B active per token"; the second part only if a token uses part of the parameters."""
    return f"{count_words(parameters)} parameters" + (f", {count_words(active)} active per token" if active < parameters else "")


def byte_words(value: float) -> str:
    """Bytes in the decimal unit that leaves one to three digits before the point."""
    return _measured(value, BYTES)


def work_words(value: float) -> str:
    """Floating-point operations: 3.479e17 → "347.9 PFLOP"."""
    return _measured(value, WORK)


def byte_unit(largest: float) -> tuple[float, str]:
    """The best unit for `largest`: its size in bytes and its symbol."""
    return next((unit for unit in reversed(BYTES) if largest >= unit[0]), BYTES[0])


def duration(seconds: float) -> str:
    """Seconds as the two units that matter: "3 min 56 s", "2 d 3 h"."""
    if not math.isfinite(seconds) or seconds < 0:
        return NONE
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    for size, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {smaller}"
    return NONE


def _measured(value: float, units: Units) -> str:
    if not math.isfinite(value):
        return NONE
    scale, unit = _unit(value, units)
    decimals = 0 if scale == 1 else 1 if abs(value) / scale >= 9.995 else 2
    return f"{value / scale:,.{decimals}f} {unit}"


def _unit(value: float, units: Units) -> tuple[float, str]:
    """The first of ascending units that leaves at most three digits before the point after rounding."""
    return next((unit for unit in units if abs(value) < 999.95 * unit[0]), units[-1])
