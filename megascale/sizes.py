"""Bytes as a person would write them. Imports no torch."""

from __future__ import annotations

import math

NONE = "–"  # where there is no number


def byte_words(value: float) -> str:
    """Bytes in the decimal unit that leaves one to three digits before the point."""
    if not math.isfinite(value):
        return NONE
    scale, unit = byte_unit(value)
    return f"{value / scale:,.{0 if scale == 1 else 1 if value / scale >= 10 else 2}f} {unit}"


def byte_unit(largest: float) -> tuple[float, str]:
    """The unit in which `largest` is best told: its size in bytes and its sign."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if largest >= 10**power:
            return 10.0**power, unit
    return 1.0, "B"
