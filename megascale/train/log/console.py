"""Output for people: a live line on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # between lines without a terminal


class Console:
    """Stops printing when its terminal or pipe is gone; training continues. `quiet`: prints warnings only."""

    def __init__(self, last_step: int, step: int, quiet: bool = False) -> None:
        self.out = RichConsole(stderr=True, highlight=False)
        self._last_step, self._next_line, self.silent, self.quiet = last_step, 0.0, False, quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if sys.stderr.isatty() and not quiet:
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.out,
            )
            self._task = self._progress.add_task("starting", total=last_step, completed=step)
            self._progress.start()

    def say(self, text: str) -> None:
        if not self.quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", style="yellow")

    def _print(self, text: str, style: str | None = None) -> None:
        if self.silent:
            return
        with self._if_heard():
            self.out.print(text, style=style, soft_wrap=True, markup=False)

    def step(self, row: dict[str, Any]) -> None:
        text = f"loss {row['loss']:.4f}  |g| {row['grad_norm']:.3g}  lr {row['lr']:.2e}  {row['tokens_per_second']:,.0f} tokens/s"
        if row["mfu"] is not None:
            text += f"  mfu {100 * row['mfu']:.0f} %"
        valid = row.get("valid_loss")
        if valid:
            text += "  " + "  ".join(f"valid[{name}] {loss:.4f}" for name, loss in valid.items())
        if row.get("evaluate"):
            valid = valid or row["evaluate"]
            text += "  " + "  ".join(f"{name}[{key}] {x:.4f}" for name, found in row["evaluate"].items() for key, x in found.items())
        if self._progress is not None and self._task is not None:
            with self._if_heard():
                self._progress.update(self._task, completed=row["step"], description=text)
                if valid:
                    self._progress.print(f"step {row['step']}  {text}")
            return
        if valid or row["step"] in (1, self._last_step) or time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_SECONDS
            self.say(f"step {row['step']}/{self._last_step}  {text}")

    def close(self) -> None:
        if self._progress is not None:
            with self._if_heard():
                self._progress.stop()

    @contextmanager
    def _if_heard(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.silent = True
