"""The rows of metrics.jsonl and events.jsonl: their format, and reading of files that a disk or a person may have damaged. No torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascale.errors import UsageError

Row = dict[str, Any]
Mistake = Callable[[Row], str | None]

NUMBERS = ("loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds", "data_seconds", "mfu", "memory_bytes")
NESTED = ("sent_bytes", "valid_loss")
# Under which modules tell of a step (model/module_metrics.py), so that no other metric may have the name.
GROUPS = ("experts", "fp8", "mtp")
LONGEST = 16 << 20  # largest line in bytes; a row with hundreds of layers has about ten thousand
LATEST_TIME = 1e11  # largest time in seconds since the epoch, about three thousand years


@dataclass(frozen=True)
class Line:
    """One line of a file, without its line feed. `row` is None for an invalid line; then `wrong` says why.

    `ended` False: the file ends here without a line feed, because a run is writing or was killed meanwhile.
    """

    number: int
    text: bytes
    row: Row | None
    wrong: str = ""
    ended: bool = True


def read_lines(path: Path, mistake: Mistake) -> Iterator[Line]:
    """The non-empty lines of a JSONL file, valid or not. Raises OSError."""
    # Only a line feed ends a row: JSON allows other line separators inside a string.
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LONGEST):
            number += 1
            ended = raw.endswith(b"\n")
            if not ended and len(raw) == LONGEST:
                while not ended and (more := file.readline(LONGEST)):
                    ended = more.endswith(b"\n")
                yield Line(number, raw[:1000], None, f"is longer than {LONGEST >> 20} MB", ended)
            elif raw.strip():
                text = raw.rstrip(b"\r\n")
                yield Line(number, text, *_read(text, mistake), ended)


def _read(text: bytes, mistake: Mistake) -> tuple[Row | None, str]:
    try:
        row = json.loads(text.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None, "is not JSON"
    wrong = mistake(row) if isinstance(row, dict) else "is not an object"
    return (None, wrong) if wrong else (row, "")


def metric_mistake(row: Row) -> str | None:
    """Why a row is invalid in metrics.jsonl; None if it is valid."""
    if not is_step(row.get("step")):
        return "has no step that is a whole number"
    for key in NUMBERS:
        if not is_number_or_null(row.get(key)):
            return f"has a {key} that is neither a number nor null"
    for key in NESTED:
        value = row.get(key)
        if value is not None and not (isinstance(value, dict) and all(is_number_or_null(v) for v in value.values())):
            return f"has a {key} that is not an object of numbers"
    return None


def event_mistake(row: Row) -> str | None:
    """Why a row is invalid in events.jsonl; None if it is valid."""
    if not is_step(row.get("step")):
        return "has no step that is a whole number"
    if not isinstance(row.get("event"), str):
        return "has no event that is a word"
    return None


def is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53  # floats are exact up to there


def is_number_or_null(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def as_time(value: Any) -> float:
    """Seconds since the epoch; NaN for an impossible time."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LATEST_TIME:
        return math.nan
    return float(value)


def make_way(path: Path) -> str | None:
    """Moves aside anything but a file under the name of a log: a folder, a dangling link, a pipe. Returns a message about it.

    Raises UsageError if it cannot be moved, or if a file may not be read and written.
    """
    try:
        if path.is_file():
            if os.access(path, os.R_OK | os.W_OK):
                return None
            raise UsageError(f"{path} may not be read and written: change its permissions (chmod u+rw), or choose another run.dir")
        if not os.path.lexists(path):
            return None
        kept = free_name(path, "set-aside")
        path.rename(kept)
    except OSError as error:
        raise UsageError(f"{path} is not a file and cannot be moved aside ({error.strerror}): remove it") from None
    return f"{path} was not a file and is now {kept.name}: a new one is started"


def free_name(path: Path, why: str) -> Path:
    """NAME.why, or the first NAME.why-2, -3 … that is free."""
    name, number = path.with_name(f"{path.name}.{why}"), 2
    while os.path.lexists(name):
        name, number = path.with_name(f"{path.name}.{why}-{number}"), number + 1
    return name
