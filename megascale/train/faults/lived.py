"""Time as a process lives it: what passes while it is frozen (SIGSTOP, a suspended job, a machine that moves) is no time to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

STILL = 5.0  # seconds between two looks that somebody takes every second: beyond, time stood still


class LivedClock:
    """Looked at every second by some thread. A longer pause counts as one second, and is told by `frozen`."""

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
        """Seconds in which time stood still, since this was asked last."""
        with self._lock:
            seconds, self._frozen = self._frozen, 0.0
            return seconds

    @property
    def last_frozen(self) -> float:
        """How long the last freeze was; 0 without any."""
        return self._last_frozen
