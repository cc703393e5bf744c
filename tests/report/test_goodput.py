"""Every second of a run's life is counted once, as what it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megascale.config.load import build_config
from megascale.report.goodput import attempts, goodput, goodput_figure, goodput_table, totals
from megascale.report.page import page
from megascale.report.read import read_run
from tests.report.runs import event, metric, write_run
from tests.runs import make_tokens, settings


def test_three_attempts(tmp_path: Path) -> None:
    """Catches seconds counted twice or not at all, a killed attempt without an end, and redone steps that count as productive."""
    # Attempt 1: 100–108 starts, runs to 208; its last 20 of 100 steps are lost. 30 s nobody. Attempt 2: 238–240 starts, stops at 300.
    events = [
        event(0, "start") | {"time": 108.0, "began": 100.0},
        event(80, "save", stalled=2.0) | {"time": 190.0},
        event(80, "resume") | {"time": 240.0, "began": 238.0, "last_seen": 208.0, "lost_steps": 20},
        event(120, "save", stalled=5.0) | {"time": 300.0},
        event(120, "stop") | {"time": 300.0},
        event(120, "resume") | {"time": 405.0, "began": 401.0, "last_seen": 301.0, "lost_steps": 0},
    ]
    rows = [metric(80, time=188.0, valid_seconds=8.0), metric(120, time=299.0, data_seconds=0.5), metric(130, time=415.0)]
    found = attempts(read_run(write_run(tmp_path / "run", rows, events)))
    first, second, third = (a.seconds for a in found)
    # Steps took 100 − 2 − 8 = 90 s for 100 steps; 20 of them are lost.
    assert first == pytest.approx({"starting": 8, "saving": 2, "evaluating": 8, "lost": 18, "productive": 72, "data": 0, "waiting": 0})
    assert second == pytest.approx({"starting": 2, "saving": 5, "evaluating": 0, "lost": 0, "productive": 36, "data": 20, "waiting": 30})
    assert third == pytest.approx({"starting": 4, "saving": 0, "evaluating": 0, "lost": 0, "productive": 10, "data": 0, "waiting": 100})
    assert sum(totals(found).values()) == pytest.approx(415 - 100)
    assert goodput(found) == pytest.approx((72 + 36 + 10) / 315)


def test_clocks_and_rows_that_lie(tmp_path: Path) -> None:
    """Catches negative seconds where a clock was set back, kinds that add up to more than there was, and times that end in a traceback."""
    events = [
        event(0, "start") | {"time": 100.0, "began": 120.0},
        event(10, "save", stalled=1e308) | {"time": 150.0},
        event(10, "save", stalled=-5.0) | {"time": 151.0},
        event(10, "resume") | {"time": 90.0, "began": 80.0, "last_seen": 1e308, "lost_steps": -3},
        event(20, "resume") | {"time": float("nan"), "began": None},
        event(20, "resume") | {"time": 400.0, "began": -1e308, "last_seen": float("nan"), "lost_steps": 10**400},
    ]
    rows = [
        metric(10, time=140.0, valid_seconds=1e308, data_seconds=1e308),
        metric(20, time=410.0, valid_seconds=-1.0),
        metric(30, time=1e308),
    ]
    run = read_run(write_run(tmp_path / "run", rows, events))
    found = attempts(run)
    assert all(0 <= seconds < 1000 for attempt in found for seconds in attempt.seconds.values())
    assert 0 <= goodput(found) <= 1 and "Where the time went" in page([run], "odd")


def test_a_run_without_times(tmp_path: Path) -> None:
    """Catches a page that fails on runs of an older version, or invents a goodput for them."""
    run = read_run(write_run(tmp_path / "run", [metric(1)], []))
    assert attempts(run) == [] and math.isnan(goodput([])) and goodput_figure(run) is None and goodput_table(run) == []
    assert "Where the time went" not in page([run], "old")


@pytest.mark.dist
def test_a_real_run(tmp_path: Path) -> None:
    """Catches a trainer that does not write what the account needs: two attempts, the first killed after its checkpoint."""
    from megascale.launch.ranks import RankInfo
    from megascale.train.setup import build_trainer

    make_tokens(tmp_path / "tokens")
    values: dict[str, Any] = settings(tmp_path, train__steps=9, checkpoint__every=4, train__eval_every=3, train__eval_steps=1)
    values["data"]["valid_fraction"] = 0.2
    config = build_config(values)
    with build_trainer(config, RankInfo()) as trainer:
        real = trainer.train_step

        def killed(step: int, batches: Any) -> Any:
            if step == 7:
                raise KeyboardInterrupt
            return real(step, batches)

        trainer.train_step = killed  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    with build_trainer(config, RankInfo()) as trainer:
        trainer.train()
    run = read_run(tmp_path / "run")
    found = attempts(run)
    resumed = json.loads(next(line for line in (tmp_path / "run" / "events.jsonl").open() if '"resume"' in line))
    assert (resumed["step"], resumed["lost_steps"]) == (4, 2)
    first, second = (a.seconds for a in found)
    assert first["lost"] > 0 and first["saving"] > 0 and first["evaluating"] > 0 and second["lost"] == 0
    # In this test both attempts are one process, which began before the first of them.
    assert sum(totals(found[:1]).values()) == pytest.approx(found[0].ended - found[0].began, abs=0.01)
    assert 0 < goodput(found) < 1 and "Where the time went" in page([run], "now")
