"""Every key is described, and the page and the schema say what the loader does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megascale.config.json_schema import config_schema, is_section, schema_text
from megascale.config.load import load_config, read_yaml
from megascale.config.reference import keys_of, page, sections
from megascale.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = config_schema()
BASE: dict[str, Any] = {
    "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 4},
    "train": {"steps": 2},
    "data": {"train": "x"},
}
AGAIN = "run `megascale schema --format markdown --out docs/config.md` and `megascale schema --out configs/schema.json`"


@pytest.mark.parametrize(("file", "made"), [("docs/config.md", page), ("configs/schema.json", schema_text)])
def test_generated_files(file: str, made: Any) -> None:
    """Catches a key that was changed or added while its page and the editors' schema were not."""
    assert (ROOT / file).read_text(encoding="utf-8") == made(), f"{file} is out of date: {AGAIN}"


def test_every_key_is_described() -> None:
    """Catches a key that a user must look up in the code."""
    found = {f"{path}.{key.name}": key.meaning for path, _, name in sections(SCHEMA) for key in keys_of(SCHEMA, name)}
    assert len(found) > 190
    bare = [name for name, meaning in found.items() if len(meaning) < 10 or not meaning.endswith(".")]
    assert not bare


def test_shipped_configs() -> None:
    """Catches a shipped config that an editor marks as wrong, or that no longer names the schema; as written and as resolved."""
    validator = pytest.importorskip("jsonschema").Draft202012Validator(SCHEMA)
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n"), path
        for values in (read_yaml(path), load_config(path).plain()):
            assert not [error.message for error in validator.iter_errors(values)], path


def places(schema: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(path, schema) of every key that takes no section, those inside of sections included."""
    for key, value in schema["properties"].items():
        name = is_section(value)
        if name is None:
            yield (*path, key), value
        elif "array" not in str(value) and "additionalProperties" not in value:
            yield from places(SCHEMA["$defs"][name], (*path, key))


PLACES = list(places(SCHEMA))
WORDS = st.sampled_from(["abc", "rope", "auto", "none", "", "..", "a/b"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**31) | st.floats(-3, 2e20, allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)


def values_of(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What the schema takes, with what lies right beside it."""
    if "anyOf" in schema:
        return st.one_of([values_of(part) for part in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        return st.lists(values_of(schema.get("items") or schema["prefixItems"][0]), max_size=3)
    if kind == "integer":
        ends = [n for key in ("minimum", "maximum") if key in schema for n in (schema[key] - 1, schema[key], schema[key] + 1)]
        return st.sampled_from(ends or [0]) | st.integers(0, 2**20)
    if kind == "number":
        return st.sampled_from([0, 0.0, 1, 1.0, -1e-9, 1e-9, 0.5]) | st.floats(-1, 1e3)
    return st.booleans() if kind == "boolean" else WORDS


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[str, ...], Any]:
    path, schema = draw(st.sampled_from(PLACES))
    if draw(st.integers(0, 9)) == 0:
        return (*path[:-1], "no_such_key"), draw(ANYTHING)
    return path, draw(values_of(schema) | ANYTHING)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(cases())
@example((("precision", "fp8"), True))
@example((("parallel", "offload"), "optimizer"))
@example((("parallel", "offload"), ["none"]))
@example((("run", "name"), ".."))
@example((("run", "name"), "a/b"))
@example((("checkpoint", "async"), False))
@example((("model", "qk_norm"), "width"))
def test_schema_and_loader_agree(case: tuple[tuple[str, ...], Any]) -> None:
    """Catches a schema that marks what the loader takes, or lets through what it refuses, in one key. What is between keys, or a conversion
    of a value (such as "3" to 3), is the loader's alone.
    """
    validator = pytest.importorskip("jsonschema").Draft202012Validator(SCHEMA)
    path, value = case
    values = json.loads(json.dumps(BASE))
    node = values
    for depth, part in enumerate(path[:-1]):
        required = {"moe": {}, "tokenformer": {"tokens": 4}, "matformer": {"sizes": [4]}, "rope_scaling": {"factor": 2.0}}
        required["spacetime"] = {"shape": [4, 4], "patch": [2, 2], "channels": 1}
        node = node.setdefault(part, dict(required.get(part, {})) if depth else {})
    node[path[-1]] = value
    accepted = not list(validator.iter_errors(values))
    if accepted:
        assert not refusals(path, values, strict=False)
    else:
        assert refusals(path, values, strict=True, between_keys=True)


def refusals(path: tuple[str, ...], values: dict[str, Any], strict: bool, between_keys: bool = False) -> list[Any]:
    """The loader's, without those that several keys decide together and that of a number which is no power of two. `between_keys`: with
    them, since they may come first.
    """
    try:
        if strict:
            Config.model_validate_json(json.dumps(values), strict=True)
        else:
            Config.model_validate(values)
    except ValidationError as error:
        return [e for e in error.errors() if between_keys or e["type"] != "value_error" or (e["loc"] == path and path[-1] == "name")]
    return []
