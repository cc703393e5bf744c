"""The config as JSON Schema, with which an editor completes and checks YAML.

It covers each key by itself: type, choices and range. Only the loader knows which keys can be combined, and it also converts values
("100" is a number to it).
"""

from __future__ import annotations

import json
from typing import Any

from megascale.config.schema import Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def config_schema() -> dict[str, Any]:
    """The schema of the whole config, with sections under `$defs` and one-line descriptions."""
    schema = _plain(Config.model_json_schema())
    return {"$schema": DIALECT, "title": "A config of megascale", **schema}


def schema_text() -> str:
    return json.dumps(config_schema(), indent=1, ensure_ascii=False) + "\n"


def is_section(schema: dict[str, Any]) -> str | None:
    """The section's name under `$defs` if a key's schema refers to one, alone, in a list or as an alternative to null."""
    for part in (schema, schema.get("items"), schema.get("additionalProperties"), *schema.get("anyOf", ())):
        if isinstance(part, dict):
            name = part.get("$ref") or is_section(part) if part is not schema else part.get("$ref")
            if name:
                return str(name).rpartition("/")[2]
    return None


def _plain(schema: Any, names: bool = False) -> Any:
    """Removes pydantic's titles, which repeat the names, and defaults of sections, which their keys have. `names`: the schema maps names to
    schemas, so its keys are not keywords.
    """
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if names:
            kept[key] = _plain(value)
        elif key == "description":
            kept[key] = " ".join(value.split())
        elif key == "default":
            if not (isinstance(value, dict) and "$ref" in schema):
                kept[key] = value
        elif key != "title":
            kept[key] = _plain(value, names=key in ("properties", "$defs"))
    return kept
