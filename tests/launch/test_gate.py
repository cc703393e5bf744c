"""Where ranks leave after a request to stop: all before the same micro-batch, whatever each is doing."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from megascale.errors import Halted
from megascale.train.faults.gate import Gate, Leaving

RANKS, POINTS = 3, 40


def together(asking: int | None, at: int, meet_every: int, seed: int) -> tuple[list[int], bool]:
    """Threads as ranks: each passes POINTS points, all meet after every `meet_every` of them, as in a collective; rank `asking` is asked to
    stop at its point `at`. How many points each passed, and whether all left early.
    """
    store, gates, asked = dist.HashStore(), [Gate() for _ in range(RANKS)], threading.Event()
    meeting, over, left = threading.Barrier(RANKS), threading.Event(), [False] * RANKS

    def main(rank: int) -> None:
        dice = random.Random(seed + rank)
        try:
            for point in range(POINTS):
                if rank == asking and point == at:
                    asked.set()
                gates[rank].enter()
                time.sleep(dice.random() / 500)
                if point % meet_every == meet_every - 1:
                    meeting.wait(10)
        except Halted:
            left[rank] = True

    def watch(rank: int) -> None:
        dice, agreement = random.Random(seed - rank), Leaving(gates[rank], store, rank, RANKS)
        while not over.is_set():
            agreement.look(rank == asking and asked.is_set())
            time.sleep(dice.random() / 200)

    def start(work: Callable[[int], None]) -> list[threading.Thread]:
        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        return threads

    watches, mains = start(watch), start(main)
    for thread in mains:
        thread.join(20)
    stuck = [thread.is_alive() for thread in mains]
    over.set()
    for thread in watches:
        thread.join(5)
    assert not any(stuck), "a rank waits for ever"
    assert len(set(left)) == 1
    return [gate.passed for gate in gates], left[0]


@pytest.mark.parametrize("meet_every", [1, 4])
@pytest.mark.parametrize("asking", [0, 2])
def test_all_leave_before_the_same_point(asking: int, meet_every: int) -> None:
    """Catches a rank that leaves while another waits for it in a collective, and a request that nobody serves before the work's end."""
    for seed in range(3):
        passed, left = together(asking, 5, meet_every, seed)
        assert left and len(set(passed)) == 1 and 5 <= passed[0] < POINTS


def test_nobody_asks() -> None:
    """Catches gates that cost a rank its way."""
    assert together(None, 0, 4, 0) == ([POINTS] * RANKS, False)


def test_asked_at_the_very_end() -> None:
    """Catches ranks that wait for an answer of one that has no point left, or whose work is over."""
    passed, _ = together(1, POINTS - 1, 4, 0)
    assert set(passed) == {POINTS}


def test_a_process_alone() -> None:
    """Catches one that waits for nobody's answer."""
    gate, asked = Gate(), [False]
    gate.asked = lambda: asked[0]
    gate.enter()
    asked[0] = True
    with pytest.raises(Halted):
        gate.enter()
    assert gate.passed == 1
