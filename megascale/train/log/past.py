"""Logs of a run's earlier attempts: repairs them before appending, and finds when the run was last alive. Rank 0 only."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from megascale.files import discard
from megascale.rows import Line, Mistake, as_time, event_mistake, free_name, is_step, make_way, metric_mistake, read_lines

Past = dict[str, Any]


def mend_rows(path: Path, mistake: Mistake, after: int | None = None) -> list[str]:
    """Repairs a log so that it has only whole rows and every step once; returns sentences about what was wrong.

    after  step of the checkpoint that the run continues from: rows of later steps are dropped, since these steps are repeated

    A half line, from a run killed while writing it, is dropped. Lines that are not rows move to NAME.damaged. If the run begins anew, the
    existing file is kept as NAME.before. A file that is in order is not touched and needs no disk space. Raises OSError, and UsageError
    for a name that something else occupies.
    """
    notes = [note for note in [make_way(path)] if note]
    if not path.exists():
        return notes
    path = path.resolve()  # if the log is a link to another disk, its rows belong there
    if after == 0 and any(line.row is not None for line in read_lines(path, mistake)):
        kept = free_name(path, "before")
        path.rename(kept)
        return [*notes, f"the run begins at step 1; the earlier rows of {path} are kept in {kept}"]
    seen: set[int] = set()

    def kind(line: Line) -> str:
        """keep, drop or damaged."""
        if line.row is None:
            return "damaged" if line.ended else "drop"
        if after is None:
            return "keep"
        step = int(line.row["step"])
        if step in seen:
            return "damaged"
        seen.add(step)
        return "keep" if step <= after else "drop"

    if all(kind(line) == "keep" and line.ended for line in read_lines(path, mistake)):
        return notes
    seen.clear()
    damaged = _rewrite(path, mistake, kind)
    if damaged:
        lines = "a line that is not a row" if damaged == 1 else f"{damaged} lines that are not rows, or repeat a step,"
        notes.append(f"{path} had {lines}, moved to {path}.damaged")
    return notes


def _rewrite(path: Path, mistake: Mistake, kind: Callable[[Line], str]) -> int:
    """Rewrites the file from the lines to keep and moves damaged ones to NAME.damaged; returns the number of those."""
    temporary, aside = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "damaged.tmp"))
    damaged = 0
    try:
        with temporary.open("wb") as kept, aside.open("wb") as other:
            for line in read_lines(path, mistake):
                what = kind(line)
                damaged += what == "damaged"
                if what != "drop":
                    (kept if what == "keep" else other).write(line.text + b"\n")
        if damaged:
            with aside.open("rb") as new, path.with_name(path.name + ".damaged").open("ab") as all_of_them:
                _copy(new, all_of_them)
        os.replace(temporary, path)
    finally:
        discard(temporary)
        discard(aside)
    return damaged


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    while block := source.read(1 << 20):
        target.write(block)


def past_of(run_dir: Path, step: int) -> Past:
    """What a resume after `step` loses, for the accounting of time: when the run was last alive, and how many steps are repeated.

    A killed process logs no end: its last row, event or heartbeat counts as the end. Unreadable files are ignored.
    """
    last_seen, furthest = -math.inf, 0
    for name, mistake in (("metrics.jsonl", metric_mistake), ("events.jsonl", event_mistake), ("heartbeat.json", _beat_mistake)):
        if not (run_dir / name).is_file():
            continue
        with suppress(OSError):
            for line in read_lines(run_dir / name, mistake):
                if line.row is not None and (told := as_time(line.row.get("time"))) == told:
                    last_seen, furthest = max(last_seen, told), max(furthest, line.row["step"])
    return {"last_seen": last_seen, "lost_steps": max(0, furthest - step)} if last_seen > 0 else {}


def last_saved(run_dir: Path) -> int | None:
    """The step of the last checkpoint in the run's events since it last began at its first step; None without one."""
    found = None
    with suppress(OSError):
        for line in read_lines(run_dir / "events.jsonl", event_mistake):
            if line.row is not None and line.row["event"] in ("start", "saved"):
                found = line.row["step"] if line.row["event"] == "saved" else None
    return found


def _beat_mistake(row: dict[str, Any]) -> str | None:
    return None if is_step(row.get("step")) else "has no step"
