"""Python's garbage collector on a beat: a pause at any moment, on any rank, is one that all ranks wait for in their next collective."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collected_every(steps: int) -> Iterator[Callable[[int], None]]:
    """Cycles are collected only where the result is called with a step that is a multiple of `steps`, on all ranks alike, and what is
    there now is not looked through. As before afterwards. 0, or a collector that somebody has switched off: left alone.
    """
    if steps == 0 or not gc.isenabled():
        yield lambda _: None
        return
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield lambda step: None if step % steps else _collect()
    finally:
        gc.unfreeze()
        gc.enable()


def _collect() -> None:
    gc.collect()
