"""Runs made up for the report: folders with the files that the trainer writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megascale.config.load import to_yaml
from megascale.report.read import RunData, read_run

Row = dict[str, Any]


def curve(step: int, seed: int = 0) -> float:
    """A loss that falls from 9 to 3 with noise that depends on the step alone."""
    noise = float(np.random.default_rng((seed, step)).normal())
    return 3 + 6 * math.exp(-step / 40) + 2 / (1 + step / 60) + 0.12 * noise


def metric(step: int, **changes: Any) -> Row:
    """A row as the trainer writes it; `changes` replace or add keys."""
    return {
        "step": step,
        "loss": curve(step),
        "grad_norm": 1 + 8 / step,
        "lr": 1e-3,
        "tokens": 2048 * step,
        "tokens_per_second": 10_000.0 + step % 7,
        "step_seconds": 0.2,
        "mfu": 0.41,
        "memory_bytes": 600_000_000,
        "sent_bytes": {"dp_shard": 40_000_000, "tp": 10_000_000},
        **changes,
    }


def event(step: int, name: str, **details: Any) -> Row:
    return {"time": 1_700_000_000 + step, "step": step, "event": name, **details}


def start(layout: str = "dp_shard2", step: int = 0, **details: Any) -> Row:
    return event(step, "resume" if step else "start", layout=layout, ranks=2, unigram_entropy=5.8, **details)


def lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_run(
    folder: Path,
    rows: Sequence[Row] = (),
    events: Sequence[Row] | None = None,
    config: Row | None = None,
    ending: Row | None = None,
) -> Path:
    """Writes the files that are given; metrics of ten steps unless `rows` says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(lines(rows or steps(10)))
    if events is not None:
        (folder / "events.jsonl").write_text(lines(events))
    if config is not None:
        (folder / "config.yaml").write_text(to_yaml(config))
    if ending is not None:
        (folder / "exit.json").write_text(json.dumps(ending))
    return folder


def make_run(folder: Path, rows: Sequence[Row] = (), events: Sequence[Row] | None = None, config: Row | None = None) -> RunData:
    return read_run(write_run(folder, rows, events, config))


def steps(last: int, change: Callable[[int], Row] = lambda step: {}) -> list[Row]:
    """Rows 1..last, each changed by what `change` says for its step."""
    return [metric(step, **change(step)) for step in range(1, last + 1)]
