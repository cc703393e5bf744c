"""Two passes of one rank that take turns, so that one computes while what the other has sent is on its way.

The second pass runs in a thread of its own, but never at the same time as the first: whoever starts an exchange lets the other go on. So
the order of everything that is computed and sent depends on the passes alone, and it is the same on all ranks that exchange.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


class Turns:
    """`pass_on` is called after an exchange has started, from either pass. A thread that is not the first pass's belongs to the second:
    autograd runs nodes in threads of its own.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.turn = 0
        self.ended = [False, False]
        self.first_thread = threading.get_ident()

    def pass_on(self) -> None:
        me = 0 if threading.get_ident() == self.first_thread else 1
        with self.changed:
            if not self.ended[1 - me]:
                self.turn = 1 - me
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.turn == me)

    def run(self, first: Callable[[], None], second: Callable[[], None], device: torch.device) -> None:
        """Runs both passes to their ends. Raises what either raises, the first pass's error first."""
        errors: list[BaseException] = []

        def beside() -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own
            with self.changed:
                self.changed.wait_for(lambda: self.turn == 1)
            try:
                second()
            except BaseException as error:
                errors.append(error)
            finally:
                self._end(1)

        thread = threading.Thread(target=beside, name="second pass")
        thread.start()
        try:
            first()
        finally:
            self._end(0)
            thread.join()
        if errors:
            raise errors[0]

    def _end(self, me: int) -> None:
        with self.changed:
            self.ended[me], self.turn = True, 1 - me
            self.changed.notify_all()
