"""JSON that others wrote: read whole, or refused in one sentence that names the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from megascale.errors import UsageError

MOST = 64 << 20  # bytes of a file: parsed, the worst text takes some twenty times as much memory


def read_json(path: Path, fix: str = "get the file again") -> Any:
    """What a JSON file holds. Numbers that JSON does not have (NaN, Infinity, 1e999) are refused.

    fix  what to do about a file that is damaged

    Raises UsageError, FileNotFoundError where there is none.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no file: {fix}")
        size = path.stat().st_size
        if size > MOST:
            raise UsageError(f"{path} has {size} bytes, and {MOST} is the most for a file of its kind: {fix}")
        return json.loads(path.read_bytes(), parse_constant=_no_number, parse_float=_finite)
    except FileNotFoundError:
        raise
    except RecursionError:
        raise UsageError(f"{path} cannot be read (it is nested too deep): {fix}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}): {fix}") from None
    except ValueError as error:
        raise UsageError(f"{path} cannot be read ({error}): {fix}") from None


def read_object(path: Path, absent: str = "name a folder that transformers saved", fix: str = "get the file again") -> dict[str, Any]:
    """A JSON object. `absent`: what to do where there is no such file. Raises UsageError."""
    try:
        value = read_json(path, fix)
    except FileNotFoundError:
        raise UsageError(f"there is no {path}: {absent}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a {type(value).__name__} instead of an object: {fix}")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond any float")
    return value
