"""Lets all ranks stop before the same micro-batch when somebody asks, without communication in a normal step.

Every rank passes the same points in the same order: one before each micro-batch, or before each step of a schedule that cannot be
interrupted. A request closes all gates, each at its rank's current point; the furthest of these is the last point that any rank passes.
The watchdog threads agree on it through the store, while main threads may wait in a collective. Imports no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from megascale.errors import Halted


class Gate:
    """`asked` is only for a single process, which has no peer to agree with: whether to stop."""

    def __init__(self) -> None:
        self.asked: Callable[[], bool] | None = None
        self.passed = 0
        self._closed = False
        self._last: int | None = None  # the number of points that all ranks pass
        self._change = threading.Condition()

    def enter(self) -> None:
        """Called by the main thread at every point. Waits while the ranks agree; raises Halted at the point where all of them leave."""
        if self.asked is not None and self.asked():
            raise Halted
        with self._change:
            while self._closed and self._last is None:
                self._change.wait()
            if self._last is not None and self.passed >= self._last:
                raise Halted
            self.passed += 1

    def close(self) -> int:
        """Blocks this rank at its next point until `leave_at`. Returns the number of points passed so far."""
        with self._change:
            self._closed = True
            return self.passed

    def await_agreement(self) -> None:
        """After a request to stop: waits until all ranks have agreed where to leave."""
        with self._change:
            while self._last is None:
                self._change.wait()

    def leave_at(self, last: int) -> None:
        with self._change:
            self._last = last
            self._change.notify_all()


class Store(Protocol):
    """The methods of torch's stores that are used here."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def multi_get(self, keys: list[str], /) -> Sequence[bytes]: ...


class Leaving:
    """One rank's part in agreeing where to leave."""

    def __init__(self, gate: Gate, store: Store, rank: int, size: int) -> None:
        self.gate, self.store, self.rank, self.size = gate, store, rank, size
        self._asked = self._posted = self._done = False

    def look(self, asked: bool) -> bool:
        """Checks the store, once per heartbeat. `asked`: somebody asked this rank to stop. Returns True until the ranks have agreed."""
        if self._done:
            return False
        if asked and not self._asked:
            self.store.set("stop", str(self.rank))
            self._asked = True
        if not self._posted:
            if not (self._asked or self.store.check(["stop"])):
                return False
            self.store.set(f"passed/{self.rank}", str(self.gate.close()))
            self._posted = True
        if self.rank == 0:
            keys = [f"passed/{r}" for r in range(self.size)]
            if not self.store.check(keys):
                return True
            self.store.set("leave", str(max(map(int, self.store.multi_get(keys)))))
        if not self.store.check(["leave"]):
            return True
        self.gate.leave_at(int(self.store.get("leave")))
        self._done = True
        return False
