"""PREFIX.json: facts about the tokens or fields next to it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megascale.errors import UsageError

LARGEST = 16 << 20  # largest size in bytes; `megascale prepare` writes under 1,000


def is_file(path: Path) -> bool:
    """Whether the file exists; False for impossible paths, such as a name of 300 letters."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# The type of each value that is used: a test and a description.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "vocab_size": (lambda v: _count(v) and v > 0, "a number of pieces"),
    "eos_id": (_count, "the number of a piece"),
    "bos_id": (_count, "the number of a piece"),
    "unigram_entropy": (_number, "a finite number"),
    "tokenizer_fingerprint": (lambda v: isinstance(v, str), "text"),
    "run_length": (lambda v: _count(v) and v > 0, "a number of frames"),
    "mean": (lambda v: isinstance(v, list) and all(map(_number, v)), "a list of finite numbers"),
    "std": (lambda v: isinstance(v, list) and all(map(_number, v)), "a list of finite numbers"),
}


def source_facts(prefix: str) -> dict[str, Any]:
    """Facts that `megascale prepare` recorded with the tokens; empty for files from other tools. Raises UsageError for invalid values."""
    path = Path(prefix + ".json")
    try:
        if not path.exists():
            return {}
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise UsageError(f"{path} is not a file of at most {LARGEST >> 20} MiB: remove it, or prepare the data again")
        facts = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply: remove it, or prepare the data again") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): remove it, or prepare the data again") from None
    if not isinstance(facts, dict):
        raise UsageError(f"{path} holds a {type(facts).__name__}, not an object of facts: remove it, or prepare the data again")
    facts = {key: value for key, value in facts.items() if value is not None}
    for key, (fits, kind) in KINDS.items():
        if key in facts and not fits(facts[key]):
            raise UsageError(f"{path}: {key} is {str(facts[key])[:60]!r}, and {kind} is needed: correct it, or prepare the data again")
    return facts
