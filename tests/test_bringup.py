"""The command for a lent device: what it runs next, what it keeps, and its table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import bringup


def record(name: str, ended: str = "ok", tiny: bool = False, result: Any = None) -> dict[str, Any]:
    return {
        "step": name,
        "ended": ended,
        "tiny": tiny,
        "seconds": 3.0,
        "machine": {"torch": "2", "gpu": "G"},
        "result": result,
        "tail": "a|b",
    }


def test_what_failed_comes_after_what_was_never_tried() -> None:
    """Catches a step that fails and uses up every later call, and a tiny result that counts on a device."""
    names = [step.name for step in bringup.STEPS]
    found = {n: record(n) for n in names[2:]} | {names[0]: record(names[0], "over its limit"), names[3]: record(names[3], tiny=True)}
    assert [step.name for step in bringup.missing(found, tiny=False)] == [names[1], names[3], names[0]]
    assert [step.name for step in bringup.missing(found, tiny=True)] == [names[1], names[0]]


@pytest.mark.parametrize("names", [("8b", "ring"), pytest.param(None, marks=pytest.mark.slow)])
def test_tiny_steps_run_to_their_end(names: tuple[str, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a step that does not start, results that are not kept, and a second call that does everything again."""
    steps = tuple(step for step in bringup.STEPS if step.tiny and (names is None or step.name in names))
    monkeypatch.setattr(bringup, "STEPS", steps)
    (page := tmp_path / "page.md").write_text(f"before\n{bringup.BEGIN}\nold\n{bringup.END}\nafter\n")
    bringup.main(minutes=9, out=tmp_path / "out", plan=False, tiny=True, tables=False, page=page)
    found = bringup.records(tmp_path / "out")
    assert {n: r["ended"] for n, r in found.items()} == {step.name: "ok" for step in steps}, [r["tail"] for r in found.values()]
    assert found["8b"]["result"]["step_seconds"] > 0 and found["ring"]["result"]["rows"][0]["share"] > 0
    assert bringup.missing(found, tiny=True) == []
    assert "old" in page.read_text(), "tiny results say nothing about a device"


def test_a_step_that_hangs_or_dies_costs_its_limit() -> None:
    """Catches a call that outlives its minutes, and an error that nobody can read afterwards."""
    step = replace(bringup.STEPS[0], tiny="http.server 0 --bind 127.0.0.1", limit=1)  # it never ends by itself
    assert bringup.run(step, True, 1.0)["ended"] == "over its limit"
    died = bringup.run(replace(step, tiny="nothing.of.that.name"), True, 20.0)
    assert died["ended"] == "exit code 1" and "nothing" in died["tail"]


def test_the_table_says_what_ran_where() -> None:
    """Catches a page that calls a step of another size, or none at all, a result."""
    whole = {"mfu": 0.5, "step_seconds": 0.1, "launches": 9, "peak_bytes": 2e9, "host_waits": ["clip.py:3"]}
    found = {"1.2b": record("1.2b", result=whole), "8b": record("8b", tiny=True, result=whole), "tests": record("tests", "exit code 1")}
    table = bringup.table(found)
    assert "| 1.2B in bf16, compiled | G, torch 2 | ok | 3.0 | 100 ms, MFU 0.50, 9 launches, 2.0 GB, host waits at clip.py:3 |" in table
    assert "| eight 8B layers in bf16, compiled | – | not run | | |" in table
    assert "a/b" in table and len(table.splitlines()) == len(bringup.STEPS) + 2


def test_a_page_without_the_marks_is_left_alone(tmp_path: Path) -> None:
    """Catches a table that takes the place of something else."""
    (page := tmp_path / "page.md").write_text("text")
    with pytest.raises(ValueError, match="no place for the table"):
        bringup.write_tables({}, page)
    assert page.read_text() == "text"
    assert bringup.last_json('x\n{"a": 1}\n{"b": {"c": 2}}\nend {') == {"b": {"c": 2}}
    assert json.dumps(bringup.last_json("nothing")) == "null"
