"""Bytes alive over a step, storage by storage, and who owns them at the peak.

Kinds are given when a storage is made and may be corrected later (a temporary of backward turns out to be a gradient), so the peak's shares
are worked out at the end, by playing back what was made and freed.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megascale.trace.memory_kinds import KINDS

UNIT = 512  # bytes; the caching allocator's


@dataclass(eq=False)
class Block:
    """A storage: rounded `size`, `kind`, the operation that made it and for which line; `died`: the phase in which it was freed."""

    size: int
    kind: str
    device: str
    operation: str
    line: str
    born: str
    died: str = ""

    @property
    def shown(self) -> str:
        """What forward made is an activation if backward finds it still there."""
        return "temporaries" if self.kind == "activations" and self.died == self.born else self.kind


@dataclass
class Peak:
    """The most bytes alive together, with shares by kind and by (kind, operation, line)."""

    total: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    by_line: dict[tuple[str, str, str], int] = field(default_factory=dict)


class Memory:
    """`time`: the model time of an event."""

    def __init__(self, time: Callable[[], float] = lambda: 0.0) -> None:
        self.time = time
        self.phase = "build"
        self.live: dict[int, Block] = {}
        self.total: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.events: list[tuple[float, int, Block]] = []

    def add(self, storage: torch.UntypedStorage, device: str, kind: str, operation: str, line: str) -> Block | None:
        """Follows a storage until it is freed; None if it is followed already."""
        key = storage._cdata
        if key in self.live:
            return None
        block = Block(_rounded(storage), kind, device, operation, line, self.phase)
        self.live[key] = block
        weakref.finalize(storage, self._gone, key, block)
        self._change(block.size, block)
        return block

    def resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 empties and refills storages in place."""
        block = self.live.get(storage._cdata)
        if block is not None:
            before, block.size = block.size, _rounded(storage)
            self._change(block.size - before, block)

    def relabel(self, tensor: torch.Tensor, kind: str) -> None:
        block = self.live.get(tensor.untyped_storage()._cdata)
        if block is not None:
            block.kind = kind

    def restart(self, phase: str) -> None:
        """Forgets the past: what is alive now is the start of what is measured."""
        self.phase = phase
        self.most = Counter(self.total)
        self.events = [(self.time(), block.size, block) for block in self.live.values()]

    def peaks(self, device: str) -> dict[str, tuple[int, int]]:
        """By place, the operation and line that made a storage: (the most bytes alive right after it, the number of that event). Each is
        linear in the number of layers; which of them is the peak may change with it.
        """
        found: dict[str, tuple[int, int]] = {}
        total = 0
        for i, (_, change, block) in enumerate(self.events):
            if block.device == device:
                total += change
                if change > 0 and total > found.get(name := f"{block.operation} {block.line}", (0, 0))[0]:
                    found[name] = total, i
        return found

    def peak(self, device: str) -> Peak:
        """The first moment with the most bytes alive."""
        found = self.peaks(device)
        if not found:
            return Peak()
        most = max(total for total, _ in found.values())
        return self.at(device, min(i for total, i in found.values() if total == most))

    def at(self, device: str, last: int) -> Peak:
        """What is alive after the event `last`."""
        sizes: Counter[Block] = Counter()
        for _, change, block in self.events[: last + 1]:
            if block.device == device:
                sizes[block] += change
        by_kind: Counter[str] = Counter()
        by_line: Counter[tuple[str, str, str]] = Counter()
        for block, size in sizes.items():
            by_kind[block.shown] += size
            by_line[block.shown, block.operation, block.line] += size
        kinds = {k: by_kind[k] for k in KINDS if by_kind[k]}
        return Peak(sum(kinds.values()), kinds, {k: n for k, n in by_line.most_common() if n})

    def curve(self, device: str) -> list[tuple[float, dict[str, int]]]:
        """(time, bytes by kind) after each event."""
        now: Counter[str] = Counter()
        points = []
        for time, change, block in self.events:
            if block.device == device:
                now[block.shown] += change
                points.append((time, dict(now)))
        return points

    def _gone(self, key: int, block: Block) -> None:
        if self.live.get(key) is block:
            del self.live[key]
            block.died = self.phase
            self._change(-block.size, block)

    def _change(self, size: int, block: Block) -> None:
        self.total[block.device] += size
        self.most[block.device] = max(self.most[block.device], self.total[block.device])
        self.events.append((self.time(), size, block))


def _rounded(storage: torch.UntypedStorage) -> int:
    return -(-storage.nbytes() // UNIT) * UNIT


def follow_resizing(memory: Memory) -> Callable[[], None]:
    """Tells `memory` of every storage resized in place; call the result to stop."""
    resize: Any = torch.UntypedStorage.resize_

    def told(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        memory.resized(storage)
        return result

    torch.UntypedStorage.resize_ = told  # type: ignore[method-assign, assignment]

    def stop() -> None:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    return stop
