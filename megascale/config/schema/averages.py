"""The averages of the weights that a run keeps: `optim.ema`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from megascale.config.schema.section import Section, steps_or_tokens

AVERAGE, MASS = "ema_", "_mass"  # how keys of an average's state begin, and how that of its sum of shares ends


def _half_life(value: Any) -> int | str | None:
    if value is None or (found := steps_or_tokens(value)) is not None:
        return None if value is None else found
    raise ValueError(f"{value!r} is no half-life: write tokens as a number, such as 1e9, or `1000 steps`")


class Ema(Section):
    """An exponential moving average of the weights."""

    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the average that a step keeps, such as 0.999. Set either this or `half_life`."""
    half_life: Annotated[int | str | None, BeforeValidator(_half_life)] = None
    """Tokens, such as 1e9, or steps, such as `1000 steps`, after which a step's weights count half."""

    @model_validator(mode="after")
    def _one(self) -> Ema:
        if (self.decay is None) == (self.half_life is None):
            raise ValueError(f"decay is {self.decay} and half_life is {self.half_life}: set exactly one of them")
        return self

    @property
    def name(self) -> str:
        """What commands and metrics call it."""
        if self.decay is not None:
            return repr(self.decay)
        return self.half_life if isinstance(self.half_life, str) else f"{self.half_life} tokens"

    @property
    def key(self) -> str:
        """Its key in the optimizer's state."""
        return AVERAGE + self.name.replace(".", "_").replace("-", "_").replace(" ", "_")

    @property
    def in_tokens(self) -> bool:
        return isinstance(self.half_life, int)

    def kept(self, tokens: int) -> float:
        """The share that a step of so many `tokens` keeps."""
        if self.decay is not None:
            return self.decay
        steps = self.half_life / tokens if isinstance(self.half_life, int) else int(str(self.half_life).split()[0])
        return float(0.5 ** (1 / steps))


def listed(value: Any) -> Any:
    """One average may stand for a list of one, and a number for its decay."""
    entries = value if isinstance(value, list | tuple) else () if value is None else [value]
    found = []
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, int | float | dict | Ema):
            raise ValueError(f"{entry!r} is no average: write a decay such as 0.999, or {{half_life: 1000 steps}}")
        found.append({"decay": entry} if isinstance(entry, int | float) else entry)
    return found


def different(averages: tuple[Ema, ...]) -> tuple[Ema, ...]:
    names = [average.name for average in averages]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is listed twice: leave one of them out")
    return averages


class OneOrMany:
    """For editors: a number or one mapping may stand for the list."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        many = handler(schema)
        entry = {"anyOf": [many["items"], {"type": "number"}]}
        return {"anyOf": [*entry["anyOf"], {**many, "items": entry}]}


def is_average(key: str) -> bool:
    """Whether a key of an optimizer's state belongs to an average."""
    return key.startswith(AVERAGE)
