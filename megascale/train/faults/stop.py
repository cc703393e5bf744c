"""Requests to stop: signals and the file STOP set a flag; the ranks agree on where to leave. Imports no torch, to start early."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

# The signals with which terminals, launchers and schedulers ask a process to end, with an explanation if the name has none.
SIGNALS = {
    signal.SIGTERM: "",
    signal.SIGINT: "",
    signal.SIGHUP: " (the terminal has closed)",
    signal.SIGUSR1: "",
    signal.SIGUSR2: "",
    signal.SIGXCPU: " (the CPU time that this process may use is nearly over)",
}
# torchrun repeats an interrupt that the terminal has already sent to its workers; nobody presses twice within this many seconds.
ECHO = 0.5


class StopFlag:
    """`reason` is None until somebody asks. A second interrupt ends the process at once.

    `file`: its existence is a request (rank 0 checks). `loud`: this rank prints that it has received the request.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.file: Path | None = None
        self.loud = False
        self._interrupted: float | None = None

    def requested(self) -> bool:
        """Also checks for the file. Called by the main thread and the watchdog."""
        if self.reason is None and self.file is not None and (found := _take(self.file)) is not None:
            self.reason = self.reason or found
        return self.heard_of()

    def heard_of(self) -> bool:
        return self.reason is not None

    def listen(self) -> None:
        """From now on until the process ends, signals only set the flag.

        A thread of its own receives them, not handlers, which wait for the main thread: that may hang in a collective whose peer is gone,
        and a second interrupt must end it there too. The handlers stay installed while the process leaves, since a launcher sends SIGTERM
        to the ranks that leave last.
        """
        ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        for s in SIGNALS:
            if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN:  # keep it ignored under nohup
                signal.signal(s, lambda *_: None)
        signal.set_wakeup_fd(mouth.detach(), warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(ear,), name="signals", daemon=True).start()

    def _hear(self, ear: socket.socket) -> None:
        while number := ear.recv(1):
            self.heard(number[0], time.monotonic())

    def heard(self, number: int, now: float) -> None:
        """Handles one signal, at `now` seconds on any clock."""
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted > ECHO:
                os._exit(130)
            self._interrupted = now if self._interrupted is None else self._interrupted
        if number in SIGNALS and self.reason is None:
            self.reason = signal.Signals(number).name
            if self.loud:
                text = f"{self.reason}{SIGNALS[signal.Signals(number)]}: stopping with a checkpoint; interrupt again to quit at once"
                with suppress(OSError):  # the terminal may be gone
                    print(f"\n{text}", file=sys.stderr, flush=True)


def _take(file: Path) -> str | None:
    """The reason to stop if the file exists; removes it, so that the next start does not stop at once. A folder is no request."""
    try:
        if not os.path.lexists(file) or (file.is_dir() and not file.is_symlink()):
            return None
        file.unlink(missing_ok=True)
    except OSError as error:
        return f"{file} exists, and could not be removed ({error.strerror}): remove it before the next start"
    return f"{file} exists"
