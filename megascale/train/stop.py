"""Requests to stop: signals and the file STOP set a flag; the ranks agree on it at a step boundary."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """`reason` is None until somebody asks. A second interrupt ends the process at once."""

    def __init__(self, run_dir: Path, watch_file: bool) -> None:
        self.reason: str | None = None
        self._file = run_dir / "STOP" if watch_file else None

    def requested(self) -> bool:
        if self.reason is None and self._file is not None and self._file.exists():
            self.reason = f"{self._file} exists"
            self._file.unlink(missing_ok=True)  # the next start of this run must not stop at once
        return self.reason is not None

    @contextmanager
    def listening(self) -> Iterator[StopFlag]:
        """Signal handlers in place; the old ones come back afterwards."""
        before = {s: signal.signal(s, self._on_signal) for s in SIGNALS}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            os._exit(130)
        self.reason = signal.Signals(number).name
