"""Two passes of one rank that take turns, so that one computes while what the other has sent is on its way.

The second pass runs in a thread of its own, but never at the same time as the first: whoever starts an exchange lets the other go on. So
the order of everything that is computed and sent depends on the passes alone, and it is the same on all ranks that exchange.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


class Abandoned(Exception):
    """Ends a pass whose other pass has failed: alone it would send in another order than the other ranks, and wait for them for ever."""


class Turns:
    """`pass_on` is called after an exchange has started, from either pass. A thread that is not the first pass's belongs to the second:
    autograd runs nodes in threads of its own.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.turn = 0
        self.ended = [False, False]
        self.errors: list[BaseException | None] = [None, None]
        self.first_thread = threading.get_ident()

    def pass_on(self) -> None:
        me = 0 if threading.get_ident() == self.first_thread else 1
        with self.changed:
            if not self.ended[1 - me]:
                self.turn = 1 - me
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.turn == me)
            self._go_on(me)

    def run(self, first: Callable[[], None], second: Callable[[], None], device: torch.device) -> None:
        """Runs both passes to their ends. Raises the error of the pass that failed first; the other ends at its next exchange."""

        def beside() -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own
            with self.changed:
                self.changed.wait_for(lambda: self.turn == 1)
            self._run(1, second)

        thread = threading.Thread(target=beside, name="second pass", daemon=True)
        thread.start()
        self._run(0, first)
        thread.join()
        for error in self.errors:
            if error is not None and not isinstance(error, Abandoned):
                raise error

    def _run(self, me: int, steps: Callable[[], None]) -> None:
        try:
            self._go_on(me)
            steps()
        except BaseException as error:
            # Autograd may wrap what a node raised.
            self.errors[me] = error if self.errors[1 - me] is None else Abandoned()
        finally:
            with self.changed:
                self.ended[me], self.turn = True, 1 - me
                self.changed.notify_all()

    def _go_on(self, me: int) -> None:
        if self.errors[1 - me] is not None:
            raise Abandoned
