"""A run's files → plain data for figures and tables.

The run may still be alive: a row that it is just writing is skipped, everything else must be valid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascale.config.load import flatten, read_yaml
from megascale.errors import UsageError
from megascale.rows import Mistake, Row, event_mistake, metric_mistake, read_lines

Array = NDArray[np.float64]
LARGEST = 1e100  # larger values are not measurements, and would overflow in the arithmetic of axes
_ABSENT = object()


@dataclass(frozen=True)
class RunData:
    """One run. `metrics` has at least one row and increasing steps; `events` are in the order written."""

    name: str
    folder: Path
    metrics: list[Row]
    events: list[Row]
    config: dict[str, Any]  # flat keys
    ending: Row  # exit.json, empty without one

    def series(self, *keys: str) -> tuple[Array, Array]:
        """Steps and values of a (nested) metric; rows without it are skipped, null becomes NaN, which is drawn as a gap."""
        steps, values = [], []
        for row in self.metrics:
            value: Any = row
            for key in keys:
                value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
            if value is not _ABSENT:
                steps.append(row["step"])
                values.append(as_number(value))
        return np.array(steps, float), np.array(values, float)

    def nested(self, key: str) -> list[str]:
        """Names below a metric that is an object: validation sets, mesh axes."""
        return sorted({name for row in self.metrics for name in row.get(key) or {}})

    @property
    def last_step(self) -> int:
        return int(self.metrics[-1]["step"])

    @property
    def starts(self) -> list[Row]:
        """The starts and resumes that make up the curve, each with its layout."""
        found: list[Row] = []
        for event in self.events:
            if event["event"] in ("start", "resume"):
                # A later start from an earlier step replaces what came after that step.
                found = [f for f in found if f["step"] < event["step"]] + [event]
        return found

    @property
    def entropy(self) -> float | None:
        """Unigram entropy of the training tokens in nats, as the last start recorded it."""
        values = [v for e in self.events if math.isfinite(v := as_number(e.get("unigram_entropy")))]
        return values[-1] if values else None


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Runs with distinct names: the run's own, its folder if two share one, plus a number if those are equal too."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    runs = [run if names.count(run.name) == 1 else replace(run, name=run.folder.resolve().name) for run in runs]
    distinct: list[RunData] = []
    for run in runs:
        taken, name, number = {r.name for r in distinct}, run.name, 2
        while name in taken:
            name, number = f"{run.name} ({number})", number + 1
        distinct.append(replace(run, name=name))
    return distinct


def read_run(folder: Path) -> RunData:
    """Raises UsageError for a folder without a run, or an invalid line."""
    metrics_path, events_path, config_path = folder / "metrics.jsonl", folder / "events.jsonl", folder / "config.yaml"
    if not metrics_path.is_file():
        raise UsageError(f"{_no_run(folder)}")
    metrics: list[Row] = []
    for row in _rows(metrics_path, metric_mistake):
        # A resume goes back to a checkpoint: rows after its step no longer count.
        while metrics and metrics[-1]["step"] >= row["step"]:
            metrics.pop()
        metrics.append(row)
    if not metrics:
        raise UsageError(f"{metrics_path} has no rows yet: wait for the first step")
    events = _rows(events_path, event_mistake) if events_path.is_file() else []
    config = flatten(read_yaml(config_path)) if config_path.is_file() else {}
    name = str(config.get("run.name") or folder.resolve().name)
    return RunData(name, folder, metrics, events, config, _read_ending(folder / "exit.json"))


def as_number(value: Any) -> float:
    """JSON numbers as floats; null, other values and numbers too large for a figure become NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if abs(number) <= LARGEST else math.nan


def _no_run(folder: Path) -> str:
    if not folder.exists():
        return f"there is no folder {folder}: name the run's folder (run.dir)"
    if not folder.is_dir():
        return f"{folder} is a file: name the run's folder (run.dir)"
    try:
        inside = sorted(str(p.parent) for p in folder.glob("*/metrics.jsonl"))
    except OSError as error:
        return f"{folder} cannot be read: {error}"
    fix = f"did you mean {', '.join(inside[:4])}?" if inside else "name the run's folder (run.dir)"
    return f"{folder} is not a run: it has no metrics.jsonl; {fix}"


def _rows(path: Path, mistake: Mistake) -> list[Row]:
    """The objects of a JSONL file. Raises UsageError naming a line that is not one, or in which `mistake` finds a mistake."""
    rows = []
    try:
        for line in read_lines(path, mistake):
            if line.row is not None:
                rows.append(line.row)
            elif line.ended or line.wrong != "is not JSON":  # no line end yet: the run is writing it, or was killed meanwhile
                text = line.text.decode("utf-8", errors="replace").strip()
                raise UsageError(f"{path}, line {line.number} {line.wrong}: {text[:60]!r}; fix or remove that line")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; check its permissions") from None
    return rows


def _read_ending(path: Path) -> Row:
    if not path.is_file():
        return {}
    try:
        ending = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError, OSError):
        ending = None
    if not isinstance(ending, dict):
        raise UsageError(f"{path}, line 1 is not a JSON object: remove the file, the report does without it")
    return ending
