"""Requests to stop: signals and the file STOP set a flag; the ranks agree on it at a step boundary. Imports no torch, to listen early."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# torchrun passes on an interrupt that the terminal has sent to its workers already; nobody presses twice within this time. Seconds.
ECHO = 0.5


class StopFlag:
    """`reason` is None until somebody asks. A second interrupt ends the process at once.

    `file`: a file that asks by being there (rank 0 looks for it). `loud`: this rank says that it has heard.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.file: Path | None = None
        self.loud = False
        self._interrupted: float | None = None

    def requested(self) -> bool:
        if self.reason is None and self.file is not None and self.file.exists():
            self.reason = f"{self.file} exists"
            self.file.unlink(missing_ok=True)  # the next start of this run must not stop at once
        return self.reason is not None

    def listen(self) -> None:
        """From here to the end of the process signals only set the flag.

        They are not heard in handlers, which wait for the main thread, but in a thread of their own: the main thread may sit in a
        collective whose peer is gone, and a second interrupt must end it there too. The handlers stay in place while the process leaves,
        since a launcher sends SIGTERM to the ranks that leave last.
        """
        ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        for s in SIGNALS:
            signal.signal(s, lambda *_: None)
        signal.set_wakeup_fd(mouth.detach(), warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(ear,), name="signals", daemon=True).start()

    def _hear(self, ear: socket.socket) -> None:
        while number := ear.recv(1):
            self.heard(number[0], time.monotonic())

    def heard(self, number: int, now: float) -> None:
        """One signal, at `now` seconds of any clock."""
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted > ECHO:
                os._exit(130)
            self._interrupted = now if self._interrupted is None else self._interrupted
        if number in SIGNALS and self.reason is None:
            self.reason = signal.Signals(number).name
            if self.loud:
                print(f"\n{self.reason}: saving after this step; interrupt again to quit at once", file=sys.stderr, flush=True)
