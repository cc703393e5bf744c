"""The simulator of a whole job: a case by hand event by event, the closed form, and sums that must hold."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.planning.goodput import best_interval, share_at
from megascale.planning.job import Chance, Failure, Job, draw, simulate
from megascale.planning.study import study, study_lines


def test_a_case_by_hand() -> None:
    """Catches a save that counts before it is written, a slow step at full speed, a spare used twice, a failure that hits nobody.

    Steps of 10 s, a save of 2 s every 3 steps, which can be loaded 20 s later.
      0–10, 10–20, 20–30 steps; 30–32 save of step 3, loadable at 52
      32–42, 42–52, 52–62 steps; 62–64 save of step 6, loadable at 84
      64–74 step 7; at 80 a node fails: step 6 is not written, so back to step 3, the spare is taken
      80–85 queue, 85–100 restart of 25 s cut off by a failure in place at 100, whose restart takes 5: 100–105
      105–115 step 4; 115–135 step 5, which starts in a slow spell of 110–130; 135–145 step 6; 145–147 save
      147–157 step 7; at 160 a node fails, step 6 can be loaded only at 167: back to step 3; the first broken node is back at 80 + 100
      160–180 waits for it, 180–185 queue; the failure at 183 hits nobody; 185–210 restart; 210–220 step 4; the end comes at 225
    """
    job = Job(
        step=10.0, every=3, save=2.0, written=20.0, restart=25.0, queue=5.0, in_place_restart=5.0, spares=1, repair=100.0, slow_factor=2.0
    )
    failures = [Failure(80.0), Failure(100.0, node=False), Failure(160.0), Failure(183.0)]
    out = simulate(job, 225.0, Chance(failures, [(110.0, 130.0)]))
    assert out.events == [
        (32.0, "saved step 3"),
        (64.0, "saved step 6"),
        (80.0, "failed at step 7, back to 3"),
        (105.0, "training from step 3"),
        (147.0, "saved step 6"),
        (160.0, "failed at step 7, back to 3"),
        (210.0, "training from step 3"),
    ]
    assert (out.steps, out.failures) == (4, 3)
    assert out.trained == 40.0 and out.slowed == 10.0 and out.saving == 6.0
    assert out.restarting == 15.0 + 5.0 + 25.0 and out.waiting == 5.0 + 25.0
    assert out.lost == (40.0 + 6.0) + (40.0 + 3.0) + 5.0


@pytest.mark.parametrize(("interval", "save", "failure", "restart"), [(600.0, 10.0, 7200.0, 300.0), (3600.0, 60.0, 7200.0, 600.0)])
def test_goodput_is_the_closed_form(interval: float, save: float, failure: float, restart: float) -> None:
    """Catches lost work, saves or restarts that cost too little or too much: Daly's expected time, to 1 % over 3,000 failures."""
    job = Job(step=1.0, every=int(interval), save=save, failure=failure, restart=restart)
    length = 3000 * failure
    found = simulate(job, length, draw(job, length, seed=1)).goodput
    assert found == pytest.approx(share_at(interval, save, failure, restart), rel=0.01)


def test_the_best_interval_is_the_closed_form() -> None:
    """Catches a simulator in which it is better to save at another time than Daly's formula says."""
    save, failure, restart = 30.0, 36000.0, 300.0
    best = best_interval(save, failure)
    length = 300 * failure
    shares = {}
    for factor in (0.3, 1.0, 3.0):
        job = Job(step=1.0, every=round(factor * best), save=save, failure=failure, restart=restart)
        shares[factor] = statistics.mean(simulate(job, length, draw(job, length, seed)).goodput for seed in range(2))
    assert max(shares, key=lambda factor: shares[factor]) == 1.0


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.5, 30), st.integers(0, 40), st.floats(0, 20), st.floats(0, 200), st.floats(50, 5000), st.floats(0, 100), st.floats(0, 1),
    st.one_of(st.none(), st.integers(0, 3)), st.floats(0, 500), st.floats(1, 4), st.integers(0, 9),
)  # fmt: skip
def test_seconds_sum_to_the_length(
    step: float, every: int, save: float, written: float, failure: float, restart: float, in_place: float,
    spares: int | None, repair: float, factor: float, seed: int,
) -> None:  # fmt: skip
    """Catches time that is counted twice or not at all, and a result that depends on anything but its seed."""
    job = Job(step, every, save, written, failure, restart, 10.0, in_place, restart / 3, spares, repair, 900.0, 300.0, factor)
    out = simulate(job, 10000.0, draw(job, 10000.0, seed))
    parts = [out.trained, out.slowed, out.lost, out.saving, out.restarting, out.waiting]
    assert min(parts) > -1e-6 and math.isclose(sum(parts), 10000.0, rel_tol=1e-6)
    assert dataclasses.asdict(out) == dataclasses.asdict(simulate(job, 10000.0, draw(job, 10000.0, seed)))


def test_a_save_waits_for_the_one_before() -> None:
    """Catches saves that overlap without cost, and a closed form that is shown where it does not hold: it knows no such wait."""
    found = study(Job(step=10.0, every=12, save=1.0, written=100.0), days=0.1)
    first = found["interval"][0]
    assert first["steps"] == 1 and first["closed_form"] is None
    assert first["goodput"] == pytest.approx(10 / 101, rel=0.02)
    assert sum("–" in line for line in study_lines(found)) == sum(r["closed_form"] is None for r in found["interval"]) > 1
