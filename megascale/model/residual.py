"""How a sublayer joins the stream, as a table: (scheme, depth) → where the norm stands and how weights start.

Blocks read the row; nothing else knows a scheme's name. A new scheme is a new row (CONTRIBUTING.md has the recipe).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Gains:
    """Factors on the initial deviation `model.init_std`, by role."""

    query: float = 1.0
    key: float = 1.0
    value: float = 1.0
    attention_out: float = 1.0
    up: float = 1.0
    gate: float = 1.0
    down: float = 1.0


@dataclass(frozen=True)
class Residual:
    """One row: x ← x + F(N(x)) when `norm_first`, else x ← N(x + F(x)); `final_norm` normalizes the stream once more before the head."""

    norm_first: bool
    final_norm: bool
    gains: Gains


def residual(scheme: str, num_layers: int) -> Residual:
    """The row of `scheme` for a stack of `num_layers` blocks with two sublayers each."""
    match scheme:
        case "pre":
            # Each of the 2L writes into the stream is scaled so that their sum keeps the size of one (GPT-2, section 2.3).
            writer = 1 / math.sqrt(2 * num_layers)
            return Residual(norm_first=True, final_norm=True, gains=Gains(attention_out=writer, down=writer))
        case "post":
            return Residual(norm_first=False, final_norm=False, gains=Gains())
        case _:
            raise ValueError(f"no residual scheme {scheme}")
