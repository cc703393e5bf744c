"""A clock that does not count time while the process is frozen (SIGSTOP, a suspended job, a migrated machine)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

STILL = 5.0  # a longer gap between two readings, taken every second, counts as a freeze (seconds)


class LivedClock:
    """A thread must read it every second. A longer gap counts as one second, and `frozen` reports it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._seen, self._lived, self._frozen, self._last_frozen = clock(), 0.0, 0.0, 0.0

    def now(self) -> float:
        with self._lock:
            seen = self._clock()
            gap, self._seen = seen - self._seen, seen
            self._lived += gap if gap <= STILL else 1.0
            if gap > STILL:
                self._frozen, self._last_frozen = self._frozen + gap, gap
            return self._lived

    def frozen(self) -> float:
        """Seconds frozen since the last call."""
        with self._lock:
            seconds, self._frozen = self._frozen, 0.0
            return seconds

    @property
    def last_frozen(self) -> float:
        """Length of the last freeze in seconds; 0 without any."""
        return self._last_frozen
