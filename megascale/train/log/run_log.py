"""The logs of a run: metrics.jsonl, events.jsonl, TensorBoard, Weights & Biases. Used on rank 0 only.

A log never ends a run: rows that cannot be written wait until there is room, and one warning says so.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megascale.errors import UsageError
from megascale.rows import event_mistake, metric_mistake
from megascale.train.log.past import Past, mend_rows, past_of

KEPT = 10_000  # rows kept in memory while the disk is full; older ones are dropped and counted
Say = Callable[[str], None]


class RowFile:
    """A JSONL file that grows by whole rows only. A row that does not fit on the disk waits."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path = path
        self._file = _open(path)
        self._end, self._sound = os.fstat(self._file).st_size, True
        self._waiting: deque[bytes] = deque()
        self.late = self.lost = 0  # since the last success: rows that had to wait, and rows dropped

    def add(self, row: dict[str, Any]) -> OSError | None:
        """Writes the waiting rows and this one. Returns the error that prevents it, if any."""
        self._waiting.append(json.dumps(finite(row)).encode() + b"\n")
        error = self._flush()
        if error is not None:
            self.late += 1
            if len(self._waiting) > KEPT:
                self._waiting.popleft()
                self.lost += 1
        return error

    def close(self) -> int:
        """Tries once more. Returns the number of rows that never reached the file."""
        if self._waiting:
            self._flush()
        with suppress(OSError):
            os.close(self._file)
        return self.lost + len(self._waiting)

    def _flush(self) -> OSError | None:
        try:
            if not self._sound:
                self._mend()
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self._sound = False
            with suppress(OSError):  # removes half a row
                os.ftruncate(self._file, self._end)
            return error
        return None

    def _write(self, line: bytes) -> None:
        done = 0
        while done < len(line):
            done += os.write(self._file, line[done:])
        self._end += len(line)

    def _mend(self) -> None:
        """Reopens the file, since the handle may be stale, and removes half a row at its end."""
        fresh = _open(self.path)
        os.close(self._file)
        self._file, size = fresh, os.fstat(fresh).st_size
        if size > self._end:
            os.ftruncate(self._file, self._end)
        self._end, self._sound = min(size, self._end), True


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)


class RunLog:
    """Appends rows; a resume drops the metric rows after its checkpoint, so that one file holds one continuous curve.

    run_dir  None: nothing is written, but warnings still appear
    say      prints warnings about the logs
    """

    def __init__(self, run_dir: Path | None, step: int, say: Say | None = None) -> None:
        """Raises UsageError if the logs cannot be opened, such as on a full disk."""
        self.run_dir, self.notes = run_dir, list[str]()
        self._say, self._said = say, set[str]()
        self._sinks: dict[str, Callable[[dict[str, Any]], None]] = {}
        self._closers: list[Callable[[], None]] = []
        self.past: Past = {}
        self._metrics: RowFile | None = None
        self._events: RowFile | None = None
        if run_dir is not None:
            self._open(run_dir, step)

    def _open(self, run_dir: Path, step: int) -> None:
        metrics, events = run_dir / "metrics.jsonl", run_dir / "events.jsonl"
        try:
            self.past = past_of(run_dir, step)
            self.notes += mend_rows(metrics, metric_mistake, after=step)
            self.notes += mend_rows(events, event_mistake)
            self._metrics, self._events = RowFile(metrics), RowFile(events)
        except OSError as error:
            raise UsageError(
                f"the logs in {run_dir} cannot be written ({error.strerror or error}): make room there, or choose another run.dir"
            ) from None

    def add_tensorboard(self, step: int) -> None:
        """Raises UsageError if TensorBoard is missing or cannot write."""
        try:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(f"{self.run_dir}/tensorboard", purge_step=step + 1)
        except ImportError:
            raise UsageError("run.tensorboard is true but the package tensorboard is missing: pip install it, or set it to false") from None
        except OSError as error:
            raise UsageError(
                f"run.tensorboard is true but {self.run_dir}/tensorboard cannot be written ({error.strerror}): make room, or set it to "
                "false"
            ) from None

        def write(row: dict[str, Any]) -> None:
            for key, value in scalars(row).items():
                writer.add_scalar(key, value, row["step"])

        self._sinks["TensorBoard"] = write
        self._closers.append(writer.close)

    def add_wandb(self, name: str, config: dict[str, Any], run_id: str | None) -> str:
        """Starts or continues a Weights & Biases run and returns its id, to be kept in checkpoints.

        W&B refuses repeated steps after a resume with a warning; since a run is a function of its config, they are the same. W&B's own exit
        hook records the end of the run and how the process ended.
        """
        try:
            import wandb
        except ImportError:
            raise UsageError("run.wandb is true but the package wandb is missing: pip install wandb, or set it to false") from None
        try:
            run = wandb.init(project=name, name=name, id=run_id, resume="allow", config=config, dir=str(self.run_dir))
        except Exception as error:  # no key, no network, no permission: all before training starts
            raise UsageError(
                f"run.wandb is true but Weights & Biases did not start ({error}): log in with `wandb login`, set WANDB_MODE=offline, "
                "or set run.wandb to false"
            ) from None
        self._sinks["Weights & Biases"] = lambda row: run.log(scalars(row), step=row["step"])
        return str(run.id)

    def metrics(self, row: dict[str, Any]) -> None:
        self._add(self._metrics, row)
        for name, sink in self._sinks.items():
            try:
                sink(row)
            except Exception as error:  # no error of an outside logger may stop training
                self.warn_once(name, f"{name} rejected the row of step {row['step']}; training continues: {error}")

    def event(self, event: str, step: int, **details: Any) -> None:
        self._add(self._events, {"time": round(time.time(), 3), "step": step, "event": event, **details})

    def warn_once(self, what: str, sentence: str) -> bool:
        """Prints a warning, only the first of its kind. Returns whether it was the first."""
        first = what not in self._said
        self._said.add(what)
        if first and self._say is not None:
            self._say(sentence)
        return first

    def close(self) -> None:
        """Never raises, since the run has ended by then."""
        for close in self._closers:
            with suppress(Exception):
                close()
        for file in (self._metrics, self._events):
            if file is not None and (lost := file.close()):
                self.warn_once(f"closing {file.path.name}", f"{lost} rows of {file.path} were never written")

    def _add(self, file: RowFile | None, row: dict[str, Any]) -> None:
        if file is None:
            return
        error = file.add(row)
        if error is not None:
            why = error.strerror or str(error)
            self.warn_once(
                file.path.name,
                f"{file.path} cannot be written ({why}); training continues: its rows are kept in memory until there is room again",
            )
        elif file.late:
            late, lost, file.late, file.lost = file.late, file.lost, 0, 0
            self._said.discard(file.path.name)
            self.event("late_rows", row["step"], file=file.path.name, late=late, lost=lost)


def finite(value: Any) -> Any:
    """Replaces numbers that JSON cannot represent by null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def scalars(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers of a row as "a/b" → number; numbers of a list by their index."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat.update(scalars(value, f"{prefix}{key}/"))
        elif isinstance(value, list):
            flat.update(scalars({str(i): v for i, v in enumerate(value)}, f"{prefix}{key}/"))
        elif isinstance(value, int | float):
            flat[prefix + key] = value
    return flat
