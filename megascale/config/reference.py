"""docs/config.md: every key of the config with its type, default, meaning and the version that brought it, from the JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from megascale.config.json_schema import config_schema, is_section

FIRST = "0.1"  # the version of keys that name none
HEAD = """# Config reference

Every key, its type, default and meaning. Write them in a YAML 1.2 file, or after a command as `section.key=value`. A key without a
default is required. Where the default is "absent", the meaning says what happens without the key. Sizes are global, never per rank.
[Layouts](layouts.md) has the table of what cannot be combined.

In an editor with a YAML language server, the line `# yaml-language-server: $schema=schema.json` at the top of a config completes and
checks these keys; `megascale schema --out schema.json` writes that file. This page is generated, too:
`megascale schema --format markdown --out docs/config.md`.
"""


class Key(NamedTuple):
    """One line of the table."""

    name: str
    type: str
    default: str
    meaning: str
    since: str


def page() -> str:
    schema = config_schema()
    parts = [HEAD]
    for title, meaning, section in sections(schema):
        keys = list(keys_of(schema, section))
        rows = [f"| `{k.name}` | {k.type} | {k.default} | {k.meaning} | {k.since} |" for k in keys]
        parts.append(
            "\n".join([f"## {title}\n\n{meaning}\n", "| key | type | default | meaning | since |", "|---|---|---|---|---|", *rows]) + "\n"
        )
    return "\n".join(parts)


def sections(schema: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(path in a config, description, name under $defs) for every section, each followed by its nested sections."""

    def inside(properties: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
        for key, value in properties.items():
            name = is_section(value)
            if name is None or (prefix and name in top):
                continue
            path = f"{prefix}{key}{'[]' if 'array' in types(value) else '.*' if 'additionalProperties' in value else ''}"
            yield path, value.get("description", ""), name
            yield from inside(schema["$defs"][name]["properties"], path + ".")

    top = {is_section(value) for value in schema["properties"].values()}
    yield from inside(schema["properties"], "")


def keys_of(schema: dict[str, Any], section: str) -> Iterator[Key]:
    found = schema["$defs"][section]
    for name, value in found["properties"].items():
        yield Key(
            name,
            type_of(value),
            default_of(value, name in found.get("required", ())),
            cell(value.get("description", "")),
            value.get("since", FIRST),
        )


def types(schema: dict[str, Any]) -> set[str]:
    return {part.get("type", "") for part in (schema, *schema.get("anyOf", ()))}


def type_of(schema: dict[str, Any]) -> str:
    """The accepted values in words: `integer ≥ 1`, `a`, `b` or `c`, list of ….  null is omitted, since the default shows it."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(type_of(part) for part in schema["anyOf"] if part.get("type") != "null"))
    if "$ref" in schema:
        return "section"
    if "enum" in schema or "const" in schema:
        return ", ".join(dict.fromkeys(f"`{literal(value)}`" for value in schema.get("enum", [schema.get("const")])))
    kind = schema.get("type", "anything")
    if kind == "array":
        if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])}: {type_of(schema['prefixItems'][0])}"
        return f"list of: {type_of(schema['items'])}"
    if kind == "object":
        inner = schema["additionalProperties"]
        return f"mapping to: {type_of(inner) if isinstance(inner, dict) else 'any value'}"
    return {"string": "text", "boolean": "`true`, `false`"}.get(kind, kind) + range_of(schema)


def range_of(schema: dict[str, Any]) -> str:
    """The bounds that inform; bounds from a million on only guard against typing errors."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema and abs(schema[key]) < 2**20]
    return f" {', '.join(bounds)}" if bounds else ""


def default_of(schema: dict[str, Any], required: bool) -> str:
    if required:
        return "required"
    value = schema.get("default", {"array": [], "object": {}}.get(schema.get("type", "")))  # pydantic omits defaults from factories
    return "absent" if value is None else f"`{literal(value)}`"


def literal(value: Any) -> str:
    """The value as written in YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def cell(text: str) -> str:
    return text.replace("|", "\\|")
