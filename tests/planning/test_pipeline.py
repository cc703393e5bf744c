"""The planner's closed forms equal the simulated orders that run."""

from __future__ import annotations

import pytest

from megascale.planning.pipeline import idle_units, live_forwards, sends
from megascale.schedule.orders import compute_order
from megascale.schedule.timeline import simulate

SCHEDULES = ["gpipe", "looped_bfs", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_closed_forms_are_the_simulated_ones(schedule: str) -> None:
    """Catches a bubble, a number of live activations or of messages that the planner believes but no rank of that schedule has: few and
    many micro-batches, one to four stages a rank, orders as torch makes them.
    """
    for ranks in (2, 3, 4, 6):
        for virtual in (1,) if schedule in ("gpipe", "1f1b") else (2,) if schedule in ("zbv", "dualpipev") else (1, 2, 4):
            for m in (1, 2, 3, 4, 5, 8, 12, 13):
                if schedule.startswith("interleaved") and m % max(1, m // ranks):
                    continue
                if schedule == "dualpipev" and m < 2 * ranks:
                    continue
                timeline = simulate(compute_order(schedule, ranks, virtual, m))
                where = (ranks, virtual, m)
                assert timeline.live == live_forwards(schedule, ranks, virtual, m), where
                assert timeline.sends == [sends(ranks, schedule, virtual, m, r) for r in range(ranks)], where
                length = max(span.end for lane in timeline.lanes for span in lane)
                assert length - 3 * m * virtual == idle_units(schedule, ranks, virtual, m), where
