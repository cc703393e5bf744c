"""Handles `checkpoint.resume`, which includes going back inside a run.

Going back to one of the run's own checkpoints moves the later ones and the curve up to here into `checkpoints/set-aside-TIME`, points
`latest` to the requested one, and records the request in `checkpoints/resumed.json`. When a scheduler runs the same command again, it
finds the record and continues from the newest checkpoint of the new branch. A start with `auto` deletes the record, so that the folder
can be requested once more.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megascale.checkpoint.choose import named_latest
from megascale.checkpoint.folders import ASIDE, LATEST, aside_in, named_as_steps, set_aside
from megascale.checkpoint.loader import find
from megascale.errors import UsageError
from megascale.files import copy_atomic, discard, write_atomic
from megascale.rows import metric_mistake, read_lines

RECORD = "resumed.json"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Note:
    """A warning for the screen, and if `event` is set an event of that name."""

    sentence: str
    event: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wish:
    """own: the run's newest checkpoint, or a new run. back: to `folder`, one of the run's own. elsewhere: a new run from `folder`."""

    kind: Literal["own", "back", "elsewhere"]
    folder: Path | None = None
    note: Note | None = None


def wish_of(wanted: str, run_dir: Path) -> Wish:
    """Interprets `checkpoint.resume`. Raises UsageError for a folder that is missing or from which this run cannot continue."""
    root = run_dir / "checkpoints"
    have = named_as_steps(root)
    if wanted == "never" and have:
        raise UsageError(
            f"checkpoint.resume is never and {run_dir} already holds a run up to {have[-1][1].name}: choose another run.name, or resume "
            "auto"
        )
    if wanted in ("auto", "never"):
        return Wish("own")
    record = read_record(root)
    if have and record.get("asked") == os.path.abspath(wanted) and not _waits(Path(record["folder"])):
        return Wish("own", note=_served(wanted, root, record))
    try:
        where = Path(wanted).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"checkpoint.resume is {wanted[:200]!r}, but it cannot be found ({reason}): name a folder step-… or a run's directory, or auto"
        ) from None
    own = run_dir.resolve()
    if where in (own, root.resolve()):
        return Wish("own")
    folder = find(wanted)
    if own in where.parents:
        return Wish("back", folder)
    if have and not _began_from(run_dir, where):
        raise UsageError(
            f"checkpoint.resume is {wanted}, and {run_dir} already holds a run up to {have[-1][1].name} that did not begin there: choose "
            "another run.name to begin there, or resume auto to go on with this run"
        )
    return Wish("own") if have else Wish("elsewhere", folder)


def go_back(run_dir: Path, folder: Path, asked: str) -> Note:
    """Makes `folder`, one of the run's own, its newest checkpoint and sets later ones aside. If `folder` itself was set aside, the rows
    of its branch return with it, and the other branch's checkpoints are set aside. Raises UsageError for a disk error.

    After a kill at any moment the same request finishes the work: rows change after the checkpoints of their steps have moved, and last
    comes the act by which `wish_of` knows that a request was met: `folder` moves out of where it was set aside, or the record is written.
    """
    root, metrics = run_dir / "checkpoints", run_dir / METRICS
    step, home = int(folder.name.rpartition("-")[2]), root / folder.name
    back = folder.parent.name.startswith(ASIDE)
    rows = folder.parent / METRICS if back else metrics
    aside = aside_in(root)
    try:
        shared, replaced = compared(metrics, rows, step) if back else (step, 0)
        left = [path for number, path in named_as_steps(root) if number > shared or (back and number == step)]
        grown = [p for p in run_dir.glob("grown-*") if any(number > shared for number, _ in named_as_steps(p))]
        if (left or grown or replaced) and metrics.is_file():
            aside.mkdir(parents=True)
            copy_atomic(metrics, aside / METRICS)
        if home.is_dir() and not back:
            write_atomic(root / LATEST, f"{home.name}\n")
        for path in (*reversed(left), *grown):
            set_aside(path, aside)
        if replaced:
            copy_atomic(rows, metrics)  # rows after `step` are dropped when the logs are opened
        if back:
            write_atomic(root / LATEST, f"{home.name}\n")
        elif not (root / named_latest(root)).is_dir():
            discard(root / LATEST)
        remember(root, asked, folder)
        if back:
            os.rename(folder, home)
    except OSError as error:
        raise UsageError(
            f"{run_dir} could not go back to {folder.name} ({error.strerror or error}: {error.filename}): repair the disk and run the same "
            "command again"
        ) from None
    rest = f"; {_count(len(left), 'checkpoint')} of the branch that is left, and its curve, are in {aside}" if aside.is_dir() else ""
    if replaced:
        rest += f"; {_count(replaced, 'row')} of {METRICS} up to here were restored from {rows}"
    elif back and not rows.is_file():
        rest += f"; {METRICS} keeps the rows up to here that it has, since {folder.parent} holds none"
    details = {"set_aside": [p.name for p in left], "where": str(aside) if aside.is_dir() else None, "rows_put_back": replaced}
    return Note(f"gone back to {folder.name} as checkpoint.resume asks{rest}", "go_back", {"folder": str(folder), **details})


def compared(now: Path, then: Path, step: int) -> tuple[int, int]:
    """Compares the rows of two branches up to `step`: the last step before they differ, and the number of rows of `then` not in `now`.

    Rows contain their time, so rows of two branches are equal only if one branch began with the other's. Raises OSError.
    """
    ours, theirs = _prints(now, step), _prints(then, step)
    differ = [n for n, text in theirs.items() if ours.get(n) != text]
    return min((n for n in differ if n in ours), default=step + 1) - 1, len(differ)


def _prints(path: Path, step: int) -> dict[int, int]:
    """{step: hash of its first row}, the row that `mend_rows` keeps."""
    found: dict[int, int] = {}
    for line in read_lines(path, metric_mistake) if path.is_file() else ():
        if line.row is not None and line.row["step"] <= step:
            found.setdefault(line.row["step"], hash(line.text))
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def remember(root: Path, asked: str, folder: Path) -> None:
    """Records that this request was met. Raises OSError."""
    root.mkdir(parents=True, exist_ok=True)
    record = {"asked": os.path.abspath(asked), "folder": str(folder.absolute()), "time": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    write_atomic(root / RECORD, json.dumps(record, indent=1) + "\n")


def forget(run_dir: Path) -> None:
    """Deletes the record of going back inside the run, since a different start was requested."""
    record = read_record(run_dir / "checkpoints")
    if record and run_dir.absolute() in Path(record["folder"]).parents:
        discard(run_dir / "checkpoints" / RECORD)


def read_record(root: Path) -> dict[str, str]:
    """The record; empty if there is none that can be read, so that the request is carried out again."""
    try:
        found = json.loads((root / RECORD).read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or not all(isinstance(found.get(k), str) for k in ("asked", "folder", "time")):
        return {}
    return found


def _waits(folder: Path) -> bool:
    """Whether a requested checkpoint is still where it had been set aside, because going back to it was killed."""
    return folder.parent.name.startswith(ASIDE) and os.path.lexists(folder)


def _served(wanted: str, root: Path, record: dict[str, str]) -> Note:
    return Note(
        f"checkpoint.resume={wanted} was carried out on {record['time']}; the run continues from its newest checkpoint since then. To go "
        "back once "
        f"more, delete {root / RECORD}"
    )


def _began_from(run_dir: Path, where: Path) -> bool:
    """Whether the run once began there according to its events, the only record of older versions."""
    try:
        lines = (run_dir / "events.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        if '"from"' not in line:
            continue
        try:
            said = json.loads(line)
            folder = Path(said["from"]).resolve()
        except (ValueError, TypeError, KeyError, OSError, RuntimeError, RecursionError):
            continue
        if folder == where or where in folder.parents:
            return True
    return False
