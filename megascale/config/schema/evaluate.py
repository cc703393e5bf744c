"""The section `evaluate`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megascale.config.schema.section import NonNegative, Section


def _one_word(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", value):
        raise ValueError(f"{value!r} is not a name: give up to 100 letters, digits, '.', '_' and '-'")
    return value


class EvaluateAt(Section):
    """An evaluation of the model on a JSONL file."""

    name: Annotated[str, AfterValidator(_one_word), Field(max_length=100, json_schema_extra={"pattern": "^[A-Za-z0-9._-]{1,100}$"})]
    """Name in metrics."""
    path: str
    """JSONL file with one item a line."""
    kind: Literal["choice", "bits", "exact"]
    """`choice`: which of several texts is the likeliest. `bits`: bits per byte. `exact`: greedy continuations that are the answer."""
    every: NonNegative | None = None
    """Steps between evaluations, besides the one at the end. 0: only at the end. Default: `train.eval_every`."""
