"""The files of a run: what counts, what is left out, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megascale.errors import UsageError
from megascale.report.read import as_number, read_run, read_runs
from tests.report.runs import event, lines, make_run, metric, start, steps, write_run


def test_half_a_last_line_is_left_out(tmp_path: Path) -> None:
    """Catches a report that fails while the run is writing, or that loses the row before."""
    folder = write_run(tmp_path / "run", steps(3), [start()])
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 4, "lo')
    run = read_run(folder)
    assert run.last_step == 3
    assert len(run.events) == 1


def test_a_whole_last_line_counts_without_its_line_feed(tmp_path: Path) -> None:
    """Catches a reader that drops the last row for want of a line feed."""
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(lines(steps(4)).rstrip("\n"))
    assert read_run(folder).last_step == 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"step": 2, "loss": ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("3", "is not an object"),
        ('{"loss": 2.0}', "has no step"),
        ('{"step": 1.5}', "has no step"),
        ('{"step": true}', "has no step"),
        ('{"step": -1}', "has no step"),
        ('{"step": 2, "loss": "low"}', "has a loss"),
        ('{"step": 2, "sent_bytes": 3}', "has a sent_bytes"),
        ('{"step": 2, "valid_loss": {"web": "low"}}', "has a valid_loss"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    """Catches damage that would pass as a gap in a curve, or end in a traceback."""
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(lines(steps(1)) + line + "\n" + lines([metric(3)]))
    with pytest.raises(UsageError, match=rf"metrics\.jsonl, line 2 {words}.*remove that line"):
        read_run(folder)


def test_a_bad_event_is_named(tmp_path: Path) -> None:
    """Catches events that are trusted unread."""
    folder = write_run(tmp_path / "run", events=[start(), {"time": 1, "step": 3}])
    with pytest.raises(UsageError, match=r"events\.jsonl, line 2 has no event"):
        read_run(folder)


def test_files_beside_the_metrics_may_be_missing_but_not_broken(tmp_path: Path) -> None:
    """Catches a report that needs config.yaml, events.jsonl or exit.json, or that hides a broken one."""
    folder = write_run(tmp_path / "run")
    run = read_run(folder)
    assert (run.name, run.events, run.config, run.ending) == ("run", [], {}, {})
    (folder / "exit.json").write_text("{")
    with pytest.raises(UsageError, match=r"exit\.json"):
        read_run(folder)
    (folder / "exit.json").unlink()
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(UsageError, match=r"config\.yaml"):
        read_run(folder)


def test_what_is_no_run_is_refused_with_the_likely_folder(tmp_path: Path) -> None:
    """Catches a traceback, or an empty report, for a mistyped folder."""
    write_run(tmp_path / "runs" / "a")
    with pytest.raises(UsageError, match=r"did you mean .*runs/a"):
        read_run(tmp_path / "runs")
    with pytest.raises(UsageError, match="there is no folder"):
        read_run(tmp_path / "none")
    with pytest.raises(UsageError, match="is a file"):
        read_run(tmp_path / "runs" / "a" / "metrics.jsonl")
    (tmp_path / "runs" / "a" / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match="no rows yet"):
        read_run(tmp_path / "runs" / "a")


def test_null_is_a_gap_and_an_absent_value_is_no_point(tmp_path: Path) -> None:
    """Catches a skipped step that is drawn as a line across, and validation points at steps without one."""
    rows = [metric(1), metric(2, loss=None, valid_loss={"web": 4.0}), metric(3)]
    run = make_run(tmp_path / "run", rows)
    at, loss = run.series("loss")
    assert at.tolist() == [1, 2, 3]
    assert np.isnan(loss).tolist() == [False, True, False]
    assert [s.tolist() for s in run.series("valid_loss", "web")] == [[2], [4]]
    assert run.nested("valid_loss") == ["web"]
    assert len(run.series("nothing")[0]) == 0


@pytest.mark.parametrize("value", [None, "3", True, math.inf, math.nan, 10**400, [1]])
def test_what_is_no_number_is_a_gap(value: object) -> None:
    """Catches infinities that spoil an axis, and whole numbers too large for a float."""
    assert math.isnan(as_number(value))


def test_rows_after_a_resume_replace_what_came_before(tmp_path: Path) -> None:
    """Catches a curve that runs back and forth when a copy of a run kept the rows after its checkpoint."""
    run = make_run(tmp_path / "run", [*steps(5), metric(4, loss=1.0), metric(5, loss=2.0)])
    at, loss = run.series("loss")
    assert at.tolist() == [1, 2, 3, 4, 5]
    assert loss.tolist()[3:] == [1.0, 2.0]


def test_starts_that_were_undone_do_not_count(tmp_path: Path) -> None:
    """Catches layouts in the curve's life whose steps were thrown away."""
    events = [start("tp2"), start("cp2", 6), event(7, "stop"), start("pp2", 4)]
    run = make_run(tmp_path / "run", events=events)
    assert [s["layout"] for s in run.starts] == ["tp2", "pp2"]
    assert run.entropy == 5.8


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    """Catches two columns of one name where runs share a config, or one folder is named twice."""
    config = {"run": {"name": "same"}}
    folders = [write_run(tmp_path / n, config=config) for n in ("a", "b")]
    assert [r.name for r in read_runs(folders[:1])] == ["same"]
    assert [r.name for r in read_runs(folders)] == ["a", "b"]
    assert [r.name for r in read_runs([folders[0]] * 3)] == ["a", "a (2)", "a (3)"]


def test_a_row_ends_at_a_line_feed_only(tmp_path: Path) -> None:
    """Catches rows cut at the line separators that JSON allows inside a string."""
    folder = write_run(tmp_path / "run")
    row = json.dumps(event(3, "signal", signal="a\u2028b"), ensure_ascii=False)
    (folder / "events.jsonl").write_text(row + "\n", encoding="utf-8")
    assert read_run(folder).events[0]["signal"] == "a\u2028b"
