"""Reads foreign JSON files, or refuses them in one sentence that names the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from megascale.errors import UsageError

MOST = 64 << 20  # largest file in bytes: parsing takes up to twenty times as much memory


def read_json(path: Path, fix: str = "get the file again") -> Any:
    """Reads a JSON file. Refuses numbers that JSON does not have (NaN, Infinity, 1e999).

    fix  advice for a damaged file

    Raises UsageError, or FileNotFoundError without a file.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file: {fix}")
        size = path.stat().st_size
        if size > MOST:
            raise UsageError(f"{path} has {size} bytes, more than the limit of {MOST}: {fix}")
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
    """Reads a JSON object. `absent`: advice if the file does not exist. Raises UsageError."""
    try:
        value = read_json(path, fix)
    except FileNotFoundError:
        raise UsageError(f"there is no {path}: {absent}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a {type(value).__name__} instead of an object: {fix}")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond any float")
    return value
