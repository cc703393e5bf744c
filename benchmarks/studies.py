"""Many small training runs in parallel, one process and one thread each; runs that are already in a results file are not repeated."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from megascale.config.load import load_config
from megascale.errors import TrainingError
from megascale.launch.ranks import RankInfo
from megascale.train.setup import build_trainer


def trained(config: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a run of `config`; they end early where training gave up, as on gradients that are not finite."""
    with tempfile.TemporaryDirectory() as folder:
        about = [f"run.dir={folder}/run", "run.threads=1", "run.device=cpu", "run.peak_tflops=0.05", "checkpoint.every=0"]
        quiet = redirect_stdout(StringIO()), redirect_stderr(StringIO()), suppress(TrainingError)
        with quiet[0], quiet[1], build_trainer(load_config(str(config), [*overrides, *about]), RankInfo()) as trainer, quiet[2]:
            trainer.train()
        return [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]


def last(losses: Sequence[float | None]) -> float:
    """The mean of the last tenth; infinite where it is not finite."""
    tail = losses[-max(1, len(losses) // 10) :]
    return math.inf if any(x is None for x in tail) else sum(x for x in tail if x is not None) / len(tail)


def study(
    path: Path, facts: Mapping[str, Any], config: Path, runs: Mapping[str, Sequence[str]], processes: int
) -> dict[str, dict[str, Any]]:
    """Trains the missing ones of `runs` (name → overrides), in order; the file `path` keeps the losses of every row, and last readings of
    FP8 and of multi-token prediction.
    """
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else {}
    todo = [name for name in runs if name not in found]
    path.parent.mkdir(exist_ok=True)
    with ProcessPoolExecutor(processes) as pool:
        for name, rows in zip(todo, pool.map(trained, [config] * len(todo), [runs[n] for n in todo])):
            losses = [r["loss"] for r in rows]
            found[name] = {"last": last(losses), "loss": [x and round(x, 4) for x in losses]}
            valid = [r["valid_loss"] for r in rows if "valid_loss" in r]
            if valid:
                found[name]["valid"] = next(iter(valid[-1].values()))
            casts = [r["fp8"] for r in rows if "fp8" in r]
            if casts:
                found[name]["casts"] = casts[-1]
            drafts = [r["mtp"]["acceptance"] for r in rows if "acceptance" in r.get("mtp", {})]
            if drafts:
                found[name]["acceptance"] = drafts[-1]
            print(name, f"{found[name]['last']:.4f}", flush=True)
            path.write_text(json.dumps({"machine": machine() | {"threads": 1}, **facts, "runs": found}) + "\n")
    return {name: found[name] for name in runs}
