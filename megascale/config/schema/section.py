"""The base class and types of all config sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

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
