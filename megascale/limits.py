"""Limits of this process below those of the machine: memory and cores of its control groups, and open files. No torch.

A group's limit applies to everything in it, so enclosing groups count too. A job of SLURM or systemd is in a group below the root; a
container usually sees its own group as the root.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
NO_LIMIT = 2**60  # bytes; version 1 represents no limit by a number slightly below 2⁶³

MANY = 65536  # open files; with a higher limit, programs that close all possible files take minutes


def memory_limits(groups: Path | None = None, membership: Path | None = None) -> list[tuple[float, float]]:
    """[(limit, used), …] in bytes for every group around this process that has a limit. Cached files that the kernel can release do not
    count as used.
    """
    found = []
    for folder, version in _around("memory", groups, membership):
        limit, used, cached = (
            ("memory.max", "memory.current", ("inactive_file", "active_file"))
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
        )
        with suppress(OSError, ValueError):  # no such file, or "max"
            most, now = int((folder / limit).read_text()), int((folder / used).read_text())
            if most < NO_LIMIT:
                found.append((float(most), float(max(0, now - _sum_of(folder / "memory.stat", cached)))))
    return found


def memory_limit(total: float, groups: Path | None = None, membership: Path | None = None) -> float:
    """Bytes that the processes here may use together: the machine's `total`, or less."""
    return min(total, *(limit for limit, _ in memory_limits(groups, membership)), total)


def memory_free(available: float, groups: Path | None = None, membership: Path | None = None) -> float:
    """Bytes still free for them: those `available` on the machine, or less."""
    return min(available, *(max(0.0, limit - used) for limit, used in memory_limits(groups, membership)), available)


def core_quota(groups: Path | None = None, membership: Path | None = None) -> int | None:
    """Cores that the groups allow, rounded up; None if none limits them."""
    found = []
    for folder, version in _around("cpu", groups, membership):
        with suppress(OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
            if version == 2:
                allowed, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                allowed, period = (int((folder / f"cpu.cfs_{what}_us").read_text()) for what in ("quota", "period"))
            if allowed > 0:
                found.append(max(1, math.ceil(allowed / period)))
    return min(found, default=None)


def own_cores() -> frozenset[int]:
    """The numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))  # not every system has affinities


def slurm_cores() -> int | None:
    """Cores that SLURM assigns to each task of this step; None if unknown."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return max(1, int(given)) if given.isdecimal() and len(given) < 6 else None


def raise_open_files() -> None:
    """Raises the limit of open files up to `MANY`: the default is 256 or 1,024, and a data source takes two."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limits, and some systems do not allow the hard limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MANY if hard == resource.RLIM_INFINITY else min(hard, MANY)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _around(controller: str, groups: Path | None, membership: Path | None) -> Iterator[tuple[Path, int]]:
    """Folders of the groups around this process that may limit `controller`, innermost first, with their cgroup version."""
    groups, membership = groups or GROUPS, membership or MEMBERSHIP
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        lines = []
    own = [(parts[1], parts[2]) for parts in lines if len(parts) == 3]
    own.append(("", "/"))  # a container's own group, if its path is one on the host
    for controllers, path in own:
        if controllers and controller not in controllers.split(","):
            continue
        # Version 1 has a tree per set of controllers.
        for root in [groups / controllers, groups / controller] if controllers else [groups]:
            steps = [step for step in path.split("/") if step and step != ".."]
            for depth in range(len(steps), -1, -1):
                yield root.joinpath(*steps[:depth]), 1 if controllers else 2


def _sum_of(path: Path, names: tuple[str, ...]) -> int:
    with suppress(OSError, ValueError):
        lines = (line.split() for line in path.read_text().splitlines())
        return sum(int(line[1]) for line in lines if len(line) == 2 and line[0] in names)
    return 0
