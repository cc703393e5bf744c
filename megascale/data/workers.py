"""Processes that work for another one: how many, and that none outlives it."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """The cores that this process may use: of the machine, its affinity, SLURM's allocation for the task and the container's quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        cores = os.cpu_count() or 1
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    limits = [cores, int(given) if given.isdecimal() and len(given) < 6 else cores, quota(CGROUPS, MEMBERSHIP) or cores]
    return max(1, min(limits))


def quota(groups: Path, membership: Path) -> int | None:
    """Cores that a control group (version 2) allows, rounded up; None where none limits them."""
    try:
        own = membership.read_text().split("0::", 1)[1].splitlines()[0].strip("/")
    except (OSError, IndexError):
        own = ""
    found: list[int] = []
    for folder in [groups / own, *(groups / own).parents]:
        try:
            allowed, period = (folder / "cpu.max").read_text().split()
            found.append(max(1, math.ceil(int(allowed) / int(period))))
        except (OSError, ValueError, ZeroDivisionError):  # no such limit: the file is absent, or says "max"
            pass
        if folder == groups:
            break
    return min(found, default=None)


def end_with_parent() -> None:
    """For the beginning of a worker: it ends when its parent does, however that ended."""
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
    """SIGTERM and SIGHUP end the process as an interrupt does, so that what it has begun is cleared away. For the main thread."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
