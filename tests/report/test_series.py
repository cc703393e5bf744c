"""Distances, smoothing, thinning, the stretches of a run, and numbers in words."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megascale.report.read import Row
from megascale.report.series import gap, layouts, markers, segments, smooth, thin
from megascale.report.summary import ending, headline, step_seconds, verdict, wall_seconds
from megascale.report.words import layout_words, scientific
from megascale.sizes import byte_words, count_words, duration, model_words, work_words
from tests.report.runs import curve, event, make_run, metric, start, steps


def test_gap_compares_equal_steps(tmp_path: Path) -> None:
    """Catches rows compared by their position, which for runs that log at different steps compares different steps."""

    def moved(step: int) -> Row:
        return {"loss": curve(step) + (0.25 if step == 6 else 0.0)}

    a = make_run(tmp_path / "a", [r for r in steps(12, moved) if r["step"] % 2 == 0])
    b = make_run(tmp_path / "b", steps(9))
    found = gap(a, b)
    assert found.steps.tolist() == [2, 4, 6, 8]
    assert found.delta == pytest.approx([0, 0, 0.25, 0])
    assert (found.equal, found.one_sided) == (3, 0)
    assert found.largest == pytest.approx(0.25)


def test_gap_leaves_out_what_is_not_finite_and_says_so(tmp_path: Path) -> None:
    """Catches a step that only one run survived counted as equal, and one that neither did counted as different."""
    a = make_run(tmp_path / "a", [metric(1, loss=None), metric(2), metric(3, loss=None)])
    b = make_run(tmp_path / "b", [metric(1), metric(2), metric(3, loss=None)])
    found = gap(a, b)
    assert found.steps.tolist() == [2]
    assert found.one_sided == 1
    assert "only one of the two is finite" in verdict([a, b])[0]


def test_gap_without_common_steps(tmp_path: Path) -> None:
    """Catches a maximum over nothing."""
    a, b = make_run(tmp_path / "a", [metric(1)]), make_run(tmp_path / "b", [metric(2)])
    assert math.isnan(gap(a, b).largest)
    assert "no step" in verdict([a, b])[0]


def test_segments_cover_every_step_once(tmp_path: Path) -> None:
    """Catches a curve with a hole, or two colours, where the layout changes."""
    events = [start("dp_shard2"), event(4, "stop"), start("tp2", 4), start("tp2", 7), start("cp2", 10)]
    found = segments(make_run(tmp_path / "run", steps(10), events))
    assert [(s.first, s.last, s.layout) for s in found] == [(1, 4, "dp_shard2"), (5, 7, "tp2"), (8, 10, "tp2")]
    assert layouts(make_run(tmp_path / "run", steps(10), events)) == "dp_shard2 → tp2"
    assert segments(make_run(tmp_path / "bare", steps(3)))[0].words == "layout not recorded"


def test_markers_share_labels_with_their_neighbours(tmp_path: Path) -> None:
    """Catches labels that lie over one another, and events of a past that a resume undid."""
    events = [start(), event(4, "signal", signal="SIGTERM"), event(4, "stop"), start("tp2", 4), event(6, "skip"), event(7, "skip")]
    run = make_run(tmp_path / "run", events=[*events, event(9, "skip"), start("tp2", 8), event(8, "saved")])
    assert [(m.step, m.text, m.resumed) for m in markers(run, nearness=1)] == [
        (4, "SIGTERM, stopped, resumed", True),
        (6, "2 × skipped", False),
        (8, "resumed", True),
    ]
    changed = make_run(tmp_path / "changed", events=[event(0, "change", changes={"optim.lr": [1, 2], "a.b": [1, 2], "c.d": [1, 2]})])
    assert markers(changed)[0].text == "changed optim.lr, a.b…"


def test_smoothing_keeps_lines_ends_and_gaps() -> None:
    """Catches a mean that bends the first steps, shortens the curve, or spreads a gap over its neighbours."""
    line = np.arange(200.0)
    assert smooth(line) == pytest.approx(line)
    line[50:53] = np.nan
    smoothed = smooth(line)
    assert np.isnan(smoothed).sum() == 3
    assert np.isfinite(smoothed[[49, 53]]).all()
    assert len(smooth(np.array([]))) == 0


def test_thinning_keeps_spikes_ends_and_gaps() -> None:
    """Catches a spike or a gap that vanishes from long curves."""
    steps, values = np.arange(50_000.0), np.sin(np.arange(50_000.0))
    values[12_345], values[20_000:20_100] = 99.0, np.nan
    kept_steps, kept = thin(steps, values, 900)
    assert len(kept) <= 900
    assert np.nanmax(kept) == 99.0
    assert np.isnan(kept[(kept_steps >= 20_000) & (kept_steps < 20_100)]).any()
    assert (kept_steps[0], kept_steps[-1]) == (0, 49_999)
    assert (np.diff(kept_steps) > 0).all()
    assert len(thin(steps[:5], values[:5])[0]) == 5


def test_numbers_in_words() -> None:
    """Catches units off by a thousand, and numbers that nobody would write so."""
    assert layout_words("dp_shard2·tp2") == "2-way sharded data × 2-way tensor parallel"
    assert layout_words("dp_replicate4 ddp") == "4-way replicated data parallel (ddp)"
    assert [layout_words(x) for x in ("1 process", "", None, "odd7")] == ["1 process", "layout not recorded", "layout not recorded", "odd7"]
    assert [scientific(x) for x in (7.2e-7, 0.0, 1.5, 3e9, math.nan)] == ["7.2×10⁻⁷", "0", "1.5", "3.0×10⁹", "–"]
    assert scientific(1e-6, 0) == "10⁻⁶"
    assert [byte_words(x) for x in (0, 999, 37_309_440, 2.5e9, 8e13)] == ["0 B", "999 B", "37.3 MB", "2.50 GB", "80.0 TB"]
    assert [byte_words(x) for x in (999_949, 999_950, 9_996_000, math.inf)] == ["999.9 kB", "1.00 MB", "10.0 MB", "–"]
    assert [count_words(x) for x in (9_999, 984_192, 999_960, 46_702_792_704)] == ["9,999", "984.2K", "1.0M", "46.7B"]
    assert model_words(46_702_792_704, 12_879_925_248) == "46.7B parameters, 12.9B active per token"
    assert model_words(1_104_000, 1_104_000) == "1.1M parameters"
    assert [work_words(x) for x in (12, 3.063e10, 3.479e17, 2e22)] == ["12 FLOP", "30.6 GFLOP", "347.9 PFLOP", "20,000.0 EFLOP"]
    assert [duration(x) for x in (0.25, 59.4, 236, 7384, 200_000, math.nan)] == [
        "0.25 s",
        "59.4 s",
        "3 min 56 s",
        "2 h 3 min",
        "2 d 7 h",
        "–",
    ]


def test_headline_numbers(tmp_path: Path) -> None:
    """Catches a best that is the last, a mean in place of a median, and a resumed run that counts as ended."""
    rows = [
        metric(1, tokens_per_second=1.0, mfu=None),
        metric(2, tokens_per_second=9000.0, valid_loss={"web": 3.5}),
        metric(6, tokens_per_second=9100.0, valid_loss={"web": 4.5}, memory_bytes=1_200_000_000, sent_bytes={"tp": 7_000_000}),
    ]
    run = make_run(tmp_path / "run", rows, [start(), start("tp2", 2), event(6, "saved")])
    facts = headline(run)
    assert facts["best validation loss, web"] == "3.5000 (step 2)"
    assert facts["last validation loss, web"] == "4.5000"
    assert facts["tokens/s, median"] == "9,000"
    assert facts["MFU, median"] == "41.0 %"
    assert facts["peak memory"] == "1.20 GB"
    assert facts["layouts over its life"] == "dp_shard2 → tp2"
    assert facts["sent per step by tp, median"] == "10.0 MB"
    assert facts["tokens"] == "12,288"
    assert wall_seconds(run) == 6
    assert step_seconds(run) == pytest.approx(6 * 0.2)
    assert ending(run).startswith("none recorded")
    assert ending(replace(run, ending={"code": 75, "reason": "stopped", "step": 2})).startswith("none recorded since the resume")
    assert ending(replace(run, ending={"code": 0, "reason": "done", "step": 6})) == "done (code 0)"
    bare = headline(make_run(tmp_path / "bare", [{"step": 1}]))
    assert bare["last loss"] == bare["tokens"] == bare["unigram entropy"] == "–"
