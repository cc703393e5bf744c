"""The rows of metrics.jsonl and events.jsonl: what one is, and how files are read that a disk or a person may have damaged. No torch."""

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
LONGEST = 16 << 20  # bytes of a line; a row with hundreds of layers has some ten thousand
LATEST_TIME = 1e11  # seconds since the epoch, some three thousand years; what is beyond is no time


@dataclass(frozen=True)
class Line:
    """One line of a file as it stands there, without its line feed. `row` None: `wrong` says why it is none.

    `ended` False: the file ends here without a line feed, as it does while a run writes, or where it was killed while it wrote.
    """

    number: int
    text: bytes
    row: Row | None
    wrong: str = ""
    ended: bool = True


def read_lines(path: Path, mistake: Mistake) -> Iterator[Line]:
    """The lines of a JSONL file that are not empty, one after another, whatever stands in them. Raises OSError."""
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
    """Why a row is none of metrics.jsonl."""
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
    """Why a row is none of events.jsonl."""
    if not is_step(row.get("step")):
        return "has no step that is a whole number"
    if not isinstance(row.get("event"), str):
        return "has no event that is a word"
    return None


def is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53  # floats count exactly up to there


def is_number_or_null(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def as_time(value: Any) -> float:
    """Seconds since the epoch; NaN for what no clock says."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LATEST_TIME:
        return math.nan
    return float(value)


def make_way(path: Path) -> str | None:
    """Moves aside what holds the name of a log and is no file: a folder, a link to nothing, a pipe. Returns a sentence about it.

    Raises UsageError where it cannot be moved, or where a file may not be read and written.
    """
    try:
        if path.is_file():
            if os.access(path, os.R_OK | os.W_OK):
                return None
            raise UsageError(f"{path} may not be read and written: give yourself the right to (chmod u+rw), or choose another run.dir")
        if not os.path.lexists(path):
            return None
        kept = free_name(path, "set-aside")
        path.rename(kept)
    except OSError as error:
        raise UsageError(f"{path} is no file and cannot be moved aside ({error.strerror}): remove it") from None
    return f"{path} was no file and is now {kept.name}: a new one is begun"


def free_name(path: Path, why: str) -> Path:
    """NAME.why, or the first NAME.why-2, -3 … under which nothing stands."""
    name, number = path.with_name(f"{path.name}.{why}"), 2
    while os.path.lexists(name):
        name, number = path.with_name(f"{path.name}.{why}-{number}"), number + 1
    return name
