"""JSONL files of evaluations: what each kind's lines must have, checked line by line before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascale.errors import UsageError

Item = dict[str, Any]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v for v in value)


def _number(value: Any) -> bool:
    return type(value) is int and value >= 0


@dataclass(frozen=True)
class Key:
    fits: Callable[[Any], bool]
    what: str  # completes "KEY must be …"
    needed: bool = True


FILLED = Key(lambda v: isinstance(v, str) and bool(v), "a text that is not empty")
KEYS: Mapping[str, Mapping[str, Key]] = {
    "choice": {
        "context": Key(_text, "a text"),
        "choices": Key(lambda v: _texts(v) and len(v) > 1, "a list of two or more texts that are not empty"),
        "answer": Key(_number, "the number of the right choice, from 0"),
    },
    "bits": {"text": FILLED},
    "exact": {
        "prompt": FILLED,
        "answer": FILLED,
        "stop": Key(_texts, "a list of texts that are not empty", needed=False),
    },
}


def read_items(path: Path, kind: str) -> list[Item]:
    """The objects of a file. Raises UsageError that names the file and the line."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"the evaluation file {path} cannot be read ({error.strerror or error}): give a JSONL file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"the evaluation file {path} is not UTF-8 (byte {error.start}): convert it") from None
    items = [_item(line, f"{path}, line {number}", kind) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not items:
        raise UsageError(f"the evaluation file {path} has no line: give one JSON object a line, with {', '.join(KEYS[kind])}")
    return items


def _item(line: str, where: str, kind: str) -> Item:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({error}): one object a line is needed") from None
    if not isinstance(item, dict):
        raise UsageError(f"{where} is no JSON object: one object a line is needed, with {', '.join(KEYS[kind])}")
    for name, key in KEYS[kind].items():
        if name not in item:
            if key.needed:
                raise UsageError(f"{where} has no key {name}: an evaluation of kind {kind} needs {', '.join(_needed(kind))} in every line")
            continue
        if not key.fits(item[name]):
            raise UsageError(f"{where} has {name} {str(item[name])[:60]!r}, but it must be {key.what}")
        texts = item[name] if isinstance(item[name], list) else [item[name]]
        if any(isinstance(t, str) and any("\ud800" <= c <= "\udfff" for c in t) for t in texts):
            raise UsageError(f"{where} has half a surrogate pair in {name}, which is not text: correct it")
    if kind == "choice" and item["answer"] >= len(item["choices"]):
        raise UsageError(f"{where} has answer {item['answer']} and {len(item['choices'])} choices: numbers count from 0")
    return item


def _needed(kind: str) -> list[str]:
    return [name for name, key in KEYS[kind].items() if key.needed]
