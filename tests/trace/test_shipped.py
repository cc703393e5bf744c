"""Every shipped config starts at its stated size, makes a step, and sends what formulas, counters and the group's log say alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.planning.memory import planned
from benchmarks.planning.shipped import RESULTS, config_of, traced
from benchmarks.planning.trace import CASES

BAND = 0.1  # of the peak, between formulas and trace
RESIDENT = 8e9  # bytes of the tracing process
ROWS: dict[str, Any] = json.loads(RESULTS.read_text())
CONTROL = 65536  # bytes of a group's messages that carry no tensors of the model, such as shapes and the loss


def agree(name: str, row: dict[str, Any]) -> None:
    assert "failed" not in row, row
    here = planned(*config_of(name))
    most: dict[str, int] = {}
    for facts in row["by_rank"].values():
        assert facts["wrong_device"] == {}
        for axis, n in facts["sent_bytes"].items():
            most[axis] = max(most.get(axis, 0), n)
            logged = facts["logged_bytes"].get(axis, n)
            assert 0 <= logged - n <= CONTROL, (axis, logged, n)
    assert most == pytest.approx(here["sent_bytes"], rel=1e-6, abs=16)
    peak = max(sum(facts["peak_bytes"].values()) for facts in row["by_rank"].values())
    assert abs(here["peak"] / peak - 1) < BAND, (here["peak"], peak)
    assert row["resident_bytes"] < RESIDENT


@pytest.mark.parametrize("name", ROWS)
def test_what_was_traced_is_what_is_planned(name: str) -> None:
    """Catches formulas that have left the program, and a config that nobody has traced."""
    agree(name, ROWS[name])


def test_every_config_is_traced() -> None:
    """Catches a new config that is not looked at."""
    assert {file for file, _, _ in CASES.values()} == {file.stem for file in Path("configs").glob("*.yaml")}


@pytest.mark.dist
@pytest.mark.parametrize("name", ["llama-1m", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != "llama-1m")])
def test_it_starts_and_makes_a_step(name: str) -> None:
    """Catches a config that no longer starts at its size, and a step that allocates, sends or waits otherwise than the file says."""
    row = traced(name, "first")
    assert "failed" not in row, row
    if name not in ROWS:
        return
    agree(name, {**row, "by_rank": {**ROWS[name]["by_rank"], **row["by_rank"]}})
    here, there = row["by_rank"]["0"], ROWS[name]["by_rank"]["0"]
    for key in ("peak_bytes", "sent_bytes", "kernels", "host_syncs"):
        assert here[key] == there[key], key
