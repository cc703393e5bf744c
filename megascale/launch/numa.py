"""Binds a rank to the cores next to its GPU, so that pinned memory and the threads that fill it are on the GPU's side of the machine.

Done by the rank itself, so that it holds under every launcher; a launcher that has bound it already is left alone.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from megascale.limits import own_cores


def cores_of(words: str) -> frozenset[int]:
    """`0-3,8` → {0, 1, 2, 3, 8}, as Linux writes lists of cores."""
    ends = [part.split("-") for part in words.strip().split(",") if part]
    return frozenset(core for first, *last in ends for core in range(int(first), int(last[0] if last else first) + 1))


def cores_near(bus: str, mine: frozenset[int], root: Path = Path("/sys")) -> frozenset[int]:
    """Those of the cores `mine` that are next to the PCI device at `bus`; all of them if none is, or if Linux does not know."""
    with suppress(OSError, ValueError):
        near = mine & cores_of((root / "bus/pci/devices" / bus / "local_cpulist").read_text(encoding="ascii"))
        return near or mine
    return mine


def bus_of(properties: Any) -> str | None:
    """The PCI address of a GPU from torch's properties; None if this torch does not tell it."""
    numbers = [getattr(properties, f"pci_{part}_id", -1) for part in ("domain", "bus", "device")]
    return None if min(numbers) < 0 else "{:04x}:{:02x}:{:02x}.0".format(*numbers)


def bind_near(properties: Any, root: Path = Path("/sys")) -> None:
    """Restricts this process to its cores next to a GPU. Threads started from now on inherit it."""
    bus, mine = bus_of(properties), own_cores()
    near = mine if bus is None else cores_near(bus, mine, root)
    if near != mine:
        with suppress(OSError):  # a cgroup may have changed meanwhile
            os.sched_setaffinity(0, near)
