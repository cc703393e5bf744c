"""The base class and types of all config sections."""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

# Whole numbers have plausible bounds, so that a typing error gives a sentence, not an hour of work or an overflow in torch.
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
# A validator fills it from other keys if it is left out or null: always a number once the config is built.
Filled = Annotated[Positive, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1, "maximum": 2**31 - 1}, {"type": "null"}]})]
NonNegative = Annotated[int, Field(ge=0, le=2**31 - 1)]
Layers = Annotated[int, Field(ge=1, le=10_000)]  # a dry run builds each of them
Ranks = Annotated[int, Field(ge=1, le=2**20)]
Threads = Annotated[int, Field(ge=1, le=1024)]  # OpenMP crashes if it cannot start them
Tokens = Annotated[int, Field(ge=1, le=10**18)]
Seed = Annotated[int, Field(ge=0, le=10**18)]
Seconds = Annotated[float, Field(gt=0, le=10**7)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1: `train.clip: true` would clip at 1, and `parallel.tp: true` would cut nothing."""
        given = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(v, bool) for v in given):
            kinds = set(types_in(cls.model_fields[info.field_name or ""].annotation))
            if kinds & {int, float} and not kinds & {bool, True, False}:
                raise PydanticCustomError("number_needed", "Input should be a number, and true and false are none")
        return value


def steps_or_tokens(value: Any) -> int | str | None:
    """A length or place within a run: whole tokens, or text such as `1000 steps`; None for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,9}) steps?", value.strip()) if isinstance(value, str) else None
    if found is not None:
        return f"{found[1]} steps"
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= 10**18 and value == int(value):
        return int(value)
    return None


def types_in(annotation: Any) -> list[Any]:
    """The types and words that an annotation is made of."""
    parts = get_args(annotation)
    return [kind for part in parts for kind in types_in(part)] if parts else [annotation]
