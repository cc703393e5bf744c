"""PREFIX.json: what is known of the tokens or fields beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megascale.errors import UsageError

LARGEST = 16 << 20  # bytes of such a file; what prepare_data.py writes has under 1,000


def is_file(path: Path) -> bool:
    """Whether there is such a file; False for what can be no path, such as a name of 300 letters."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# What the values that are used must be: a test, and in words.
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
    """What prepare_data.py recorded beside the tokens; empty for files from elsewhere. Raises UsageError for values that cannot be used."""
    path = Path(prefix + ".json")
    try:
        if not path.exists():
            return {}
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise UsageError(f"{path} is no file of at most {LARGEST >> 20} MiB: remove it, or prepare the data again")
        facts = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply: remove it, or prepare the data again") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): remove it, or prepare the data again") from None
    if not isinstance(facts, dict):
        raise UsageError(f"{path} holds a {type(facts).__name__} and not an object of facts: remove it, or prepare the data again")
    facts = {key: value for key, value in facts.items() if value is not None}
    for key, (fits, kind) in KINDS.items():
        if key in facts and not fits(facts[key]):
            raise UsageError(f"{path}: {key} is {str(facts[key])[:60]!r}, and {kind} is needed: correct it, or prepare the data again")
    return facts
