"""Where all ranks leave together when somebody asks them to stop: before the same micro-batch, without a message in a step that goes on.

Every rank passes the same points in the same order: one before each micro-batch, or before each step of a schedule that cannot be left in
the middle. A request closes all gates, each where its rank is by then; the furthest of these places is the last point that anybody passes.
The threads of the watch agree on it through the store, beside main threads that may wait in a collective. Imports no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from megascale.errors import Halted


class Gate:
    """`asked`: for a process alone, which has nobody to agree with, whether it is to stop."""

    def __init__(self) -> None:
        self.asked: Callable[[], bool] | None = None
        self.passed = 0
        self._closed = False
        self._last: int | None = None  # how many points all ranks pass
        self._change = threading.Condition()

    def enter(self) -> None:
        """The main thread, at every point. Waits while the ranks agree; raises Halted where all of them leave."""
        if self.asked is not None and self.asked():
            raise Halted
        with self._change:
            while self._closed and self._last is None:
                self._change.wait()
            if self._last is not None and self.passed >= self._last:
                raise Halted
            self.passed += 1

    def close(self) -> int:
        """Nobody passes from now on until `leave_at`. Returns how many points this rank has passed."""
        with self._change:
            self._closed = True
            return self.passed

    def await_agreement(self) -> None:
        """Waits until all ranks have agreed where they leave, which somebody has asked for."""
        with self._change:
            while self._last is None:
                self._change.wait()

    def leave_at(self, last: int) -> None:
        with self._change:
            self._last = last
            self._change.notify_all()


class Store(Protocol):
    """What torch's stores can do."""

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
        """A look at the store, every beat. `asked`: somebody has asked this rank to stop. True while an answer is awaited."""
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
