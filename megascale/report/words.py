"""Numbers and layouts as a person would write them."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from megascale.config.axes import AXES
from megascale.sizes import NONE

WORDS = {**{axis.name: axis.words for axis in AXES}, "ep": "expert", "etp": "expert tensor"}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def layout_words(layout: Any) -> str:
    """ "dp_shard2·tp2" → "2-way sharded data × 2-way tensor parallel"; text that does not look like axes is returned unchanged."""
    if not isinstance(layout, str) or not layout:
        return "layout not recorded"
    axes, _, extra = layout.partition(" ")
    parts = [re.fullmatch(r"([a-z_]+?)(\d+)", part) for part in axes.split("·")]
    if not all(p and p[1] in WORDS for p in parts):
        return layout
    words = " × ".join(f"{p[2]}-way {WORDS[p[1]]}" for p in parts if p)
    return f"{words} parallel" + (f" ({extra})" if extra else "")


def scientific(value: float, digits: int = 1) -> str:
    """7.2e-07 → "7.2×10⁻⁷", only the power of ten if `digits` is 0; plain between 0.01 and 10000."""
    if not math.isfinite(value):
        return NONE
    if value == 0 or (digits and 1e-2 <= abs(value) < 1e4):
        return f"{value:.{digits + 1}g}"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    power = "10" + str(int(exponent)).translate(SUPERSCRIPTS)
    return power if digits == 0 else f"{mantissa}×{power}"


def fixed(value: float, digits: int, unit: str = "") -> str:
    """A number with thousands separators and its unit; a dash if there is none."""
    return f"{value:,.{digits}f}{unit}" if math.isfinite(value) else NONE


def plain(value: Any) -> str:
    """A value of a config or an event: words as they are, everything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False, default=str)


def count(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")
