"""What a run writes about itself: metrics.jsonl, events.jsonl, TensorBoard, Weights & Biases. Used on rank 0 only."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megascale.errors import UsageError
from megascale.files import write_atomic


class RunLog:
    """Appends rows; a resume drops the metric rows after its checkpoint, so that one file holds one continuous curve."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self.run_dir = run_dir
        self.past = past_of(run_dir, step)
        self._keep(run_dir / "metrics.jsonl", lambda row: row.get("step", 0) <= step)
        self._keep(run_dir / "events.jsonl", lambda row: True)
        self._metrics = open(run_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._events = open(run_dir / "events.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._sinks: list[Callable[[dict[str, Any]], None]] = []

    def add_tensorboard(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=step + 1)

        def write(row: dict[str, Any]) -> None:
            for key, value in scalars(row).items():
                writer.add_scalar(key, value, row["step"])

        self._sinks.append(write)

    def add_wandb(self, name: str, config: dict[str, Any], run_id: str | None) -> str:
        """Starts or continues a Weights & Biases run and returns its id, to be kept in checkpoints.

        Steps that a resume does again are refused there with a warning; a run being a function of its config, they are the same. The end of
        the run, and how the process ended, is what W&B's own exit hook sees.
        """
        try:
            import wandb
        except ImportError:
            raise UsageError("run.wandb is true and the package wandb is missing: pip install wandb, or set it to false") from None
        try:
            run = wandb.init(project=name, name=name, id=run_id, resume="allow", config=config, dir=str(self.run_dir))
        except Exception as error:  # no key, no network, no right to write: all of them before anything is trained
            raise UsageError(
                f"run.wandb is true and Weights & Biases did not start ({error}): log in with `wandb login`, set WANDB_MODE=offline, "
                "or set run.wandb to false"
            ) from None
        self._sinks.append(lambda row: run.log(scalars(row), step=row["step"]))
        return str(run.id)

    def metrics(self, row: dict[str, Any]) -> None:
        self._write(self._metrics, row)
        for sink in self._sinks:
            sink(row)

    def event(self, event: str, step: int, **details: Any) -> None:
        self._write(self._events, {"time": round(time.time(), 3), "step": step, "event": event, **details})

    def close(self) -> None:
        self._metrics.close()
        self._events.close()

    @staticmethod
    def _write(file: Any, row: dict[str, Any]) -> None:
        file.write(json.dumps(finite(row)) + "\n")
        file.flush()

    @staticmethod
    def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrites a file with the rows that are wanted; the half line of a run that was killed while writing it goes."""
        if path.exists():
            write_atomic(path, "".join(line + "\n" for line, row in whole_rows(path) if wanted(row)))


def whole_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a JSONL file that hold an object, with it; none where there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            found.append((line, row))
    return found


def past_of(run_dir: Path, step: int) -> dict[str, Any]:
    """What a resume after `step` forgets, for the account of time: when the run was last alive, and how many steps are done again.

    A process that is killed tells no end: its last row, event or heartbeat stands for it.
    """
    rows = [row for name in ("metrics.jsonl", "events.jsonl", "heartbeat.json") for _, row in whole_rows(run_dir / name)]
    times = [row["time"] for row in rows if isinstance(row.get("time"), int | float)]
    if not times:
        return {}
    steps = [row["step"] for row in rows if isinstance(row.get("step"), int)]
    return {"last_seen": max(times), "lost_steps": max(0, max(steps, default=0) - step)}


def finite(value: Any) -> Any:
    """Numbers that JSON cannot hold become null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def scalars(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers of a row as "a/b" → number; those of a list by their place in it."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat.update(scalars(value, f"{prefix}{key}/"))
        elif isinstance(value, list):
            flat.update(scalars({str(i): v for i, v in enumerate(value)}, f"{prefix}{key}/"))
        elif isinstance(value, int | float):
            flat[prefix + key] = value
    return flat
