"""Worker processes: how many, and that none outlives its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megascale.limits import core_quota, own_cores, slurm_cores

PR_SET_PDEATHSIG = 1


def usable_cores() -> int:
    """The number of cores this process may use: the machine's, limited by affinity, SLURM's allocation and the container's quota."""
    cores = len(own_cores())
    return min(cores, slurm_cores() or cores, core_quota() or cores)


def end_with_parent() -> None:
    """Call at the start of a worker: it ends when its parent does, however that ends."""
    parent = os.getppid()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process like an interrupt, so that it cleans up. Call in the main thread."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
