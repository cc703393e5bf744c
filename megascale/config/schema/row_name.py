"""A key whose value names a row, built in or from a plugin: checked like the choices of other keys, and listed in JSON Schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from megascale.plugins import installed


@dataclass(frozen=True)
class RowName:
    """For `Annotated[str, RowName(table)]`."""

    table: Callable[[], Mapping[str, Any]]

    def check(self, value: str) -> str:
        names = list(self.table())
        if value in names:
            return value
        *most, last = (repr(name) for name in names)
        expected = f"{', '.join(most)} or {last}" if most else last
        raise PydanticCustomError(
            "row_name",  # type: ignore[arg-type]
            "Input should be {expected}",  # type: ignore[arg-type]
            {"expected": expected, "plugins": installed()},
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.table())}
