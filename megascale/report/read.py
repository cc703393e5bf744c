"""A run's files → plain data for figures and tables."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascale.config.load import flatten, read_yaml
from megascale.errors import UsageError

Row = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    name: str
    folder: Path
    metrics: list[Row]
    events: list[Row]
    config: dict[str, Any]  # flat keys
    ending: Row

    def series(self, *keys: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Steps and values of a (nested) metric; rows without it are left out, null becomes NaN, which draws as a gap."""
        steps, values = [], []
        for row in self.metrics:
            value: Any = row
            for key in keys:
                value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
            if value is not _ABSENT and (value is None or isinstance(value, int | float)):
                steps.append(row["step"])
                values.append(math.nan if value is None else float(value))
        return np.array(steps, float), np.array(values, float)

    def nested(self, key: str) -> list[str]:
        """Names below a metric that is an object: validation sets, mesh axes."""
        return sorted({name for row in self.metrics if isinstance(row.get(key), dict) for name in row[key]})

    @property
    def starts(self) -> list[Row]:
        """The starts and resumes, each with its layout, that the curve consists of."""
        found: list[Row] = []
        for event in self.events:
            if event["event"] in ("start", "resume"):
                # A later start from an earlier step takes over what came after that step.
                found = [f for f in found if f["step"] < event["step"]] + [event]
        return found

    @property
    def entropy(self) -> float | None:
        values = [v for e in self.events if isinstance(v := e.get("unigram_entropy"), int | float)]
        return float(values[-1]) if values else None


_ABSENT = object()


def read_run(folder: Path) -> RunData:
    """Raises UsageError for a folder that holds no run, or a line that is no row."""
    if not (folder / "metrics.jsonl").is_file():
        raise UsageError(f"{folder} is no run: it has no metrics.jsonl; name the folder that run.dir says")
    metrics = [r for r in _rows(folder / "metrics.jsonl") if isinstance(r.get("step"), int)]
    if not metrics:
        raise UsageError(f"{folder / 'metrics.jsonl'} has no rows yet: wait for the first step")
    events_path, config_path, exit_path = folder / "events.jsonl", folder / "config.yaml", folder / "exit.json"
    events = [e for e in _rows(events_path) if "event" in e and isinstance(e.get("step"), int)] if events_path.is_file() else []
    config = flatten(read_yaml(config_path)) if config_path.is_file() else {}
    try:
        ending = json.loads(exit_path.read_text(encoding="utf-8")) if exit_path.is_file() else {}
    except ValueError:
        ending = {}
    return RunData(str(config.get("run.name", folder.name)), folder, metrics, events, config, ending)


def _rows(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                continue  # the run may be writing it
            raise UsageError(f"{path}, line {number} is not JSON: {line[:60]!r}; remove the line") from None
        if isinstance(row, dict):
            rows.append(row)
    return rows


def gap(run: RunData, reference: RunData) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """|Δ loss| at the steps that both runs have."""
    a, b = (dict(zip(*(s.tolist() for s in r.series("loss")))) for r in (run, reference))
    steps = sorted(a.keys() & b.keys())
    return np.array(steps, float), np.array([abs(a[s] - b[s]) for s in steps], float)
