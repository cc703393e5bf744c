"""The tool that injects faults: it must see what went wrong, spare what a run needs, and leave no process behind."""

from __future__ import annotations

import json
import random
import signal
import sys
from pathlib import Path

import psutil
import pytest

from megascale.chaos import job as jobs
from megascale.chaos.chain import Attempt, last_step, layouts_of, losses
from megascale.chaos.draw import draw
from megascale.chaos.faults import FILES, IRREPLACEABLE, PROCESS, damage
from megascale.chaos.job import Job
from megascale.chaos.verdict import attempt_problems, gap, problems

CALM = [(step, 3.0 / step) for step in range(1, 9)]


def make_run(folder: Path, curve: list[tuple[int, float]] = CALM) -> Path:
    """The files of a run, as far as this tool looks at them."""
    for step in (3, 6):
        path = folder / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True)
        for name in ("rank-00000.safetensors", "index.json", "trainer.json"):
            (path / name).write_text(f"{name} of {step}")
    (folder / "checkpoints" / "latest").write_text("step-00000006\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": loss}) + "\n" for s, loss in curve))
    for name in ("events.jsonl", "exit.json", "config.yaml", "heartbeat.json"):
        (folder / name).write_text('{"code": 75}\n')
    return folder


def attempt(codes: list[int] | None = None, traceback: bool = False, layout: str = "1 rank alone", ending: int | None = 0) -> Attempt:
    return Attempt(1, layout, None, (("SIGTERM all ranks", 4),), codes, ending, 0, 8, 1.0, traceback, "the last words")


def test_an_equal_curve_has_no_problem(tmp_path: Path) -> None:
    assert problems(CALM, make_run(tmp_path), [attempt([75]), attempt([-9]), attempt([5]), attempt([0])], same_layout=True) == []


@pytest.mark.parametrize(
    ("curve", "same", "word"),
    [
        ([*CALM[:-1], (8, 3.0 / 8 * (1 + 1e-7))], True, "differs by 1.00e-07"),
        ([*CALM[:-1], (8, 3.0 / 8 * (1 + 1e-3))], False, "differs by 1.00e-03"),
        (CALM[:-1], True, "steps 8 are missing"),
        ([*CALM, CALM[-1]], True, "steps 8 occur more than once"),
    ],
)
def test_another_curve_is_a_problem(tmp_path: Path, curve: list[tuple[int, float]], same: bool, word: str) -> None:
    """Catches a comparison that passes whatever the run did."""
    found = problems(CALM, make_run(tmp_path, curve), [attempt([0])], same_layout=same)
    assert len(found) == 1 and word in found[0]


def test_rounding_is_allowed_between_layouts_only() -> None:
    assert 0 < gap(CALM, [(s, loss * (1 + 1e-7)) for s, loss in CALM]) < 1e-5
    assert gap([(1, None)], [(1, None)]) == 0 and gap([(1, None)], [(1, 2.0)]) == float("inf")


def test_left_overs_are_problems(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / ".exit.json.12.tmp").touch()
    (run / "checkpoints" / ".tmp-step-00000009").mkdir()
    assert len(problems(CALM, run, [attempt([0])], same_layout=True)) == 1
    assert "2" not in problems(CALM, run, [attempt([0])], same_layout=True)[0].split(":")[0]


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (attempt(None), "hung"),
        (attempt([1], traceback=True), "traceback"),
        (attempt([2]), "ended with 2"),
        (attempt([3]), "ended with 3"),
        (attempt([-signal.SIGSEGV]), "crashed"),
        (attempt([1], layout="2 ranks torchrun", ending=2), "ended with 2"),
    ],
)
def test_endings_that_nobody_should_see(wrong: Attempt, word: str) -> None:
    assert any(word in p for p in attempt_problems(wrong))


def test_torchrun_turns_every_code_into_1() -> None:
    assert attempt_problems(attempt([1], layout="2 ranks torchrun", ending=75)) == []


def test_damage_spares_what_the_run_needs(tmp_path: Path) -> None:
    """Catches a chain that ends because the tool itself destroyed the last whole checkpoint or rows that nothing can bring back."""
    kinds = set()
    for seed in range(60):
        run = make_run(tmp_path / str(seed))
        before = (run / "metrics.jsonl").read_bytes()
        told = damage(run, random.Random(seed))
        assert told is not None
        kinds.add(next((k for k in FILES if told.endswith(k)), "odd folder"))
        oldest = run / "checkpoints" / "step-00000003"
        assert {p.name: p.read_text() for p in oldest.iterdir()} == {p.name: f"{p.name} of 3" for p in oldest.iterdir()}
        assert len(list(oldest.iterdir())) == 3
        assert (run / "metrics.jsonl").read_bytes().startswith(before) and losses(run) == CALM
    assert len(kinds) >= 7 and set(IRREPLACEABLE) == {"metrics.jsonl", "events.jsonl"}


def test_signals_reach_the_ranks_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that outlive their attempt and would disturb the next one."""
    script = tmp_path / "pretrain.py"
    script.write_text("import sys, time\nprint('begun', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr(jobs, "PRETRAIN", [str(script)])
    job = Job("by hand", 2, [], tmp_path, "attempt")
    pids = job.ranks()
    assert len(pids) == 2 and job.running() and job.wait(0.2) is None
    assert PROCESS["SIGKILL one rank"](job, tmp_path, 1.0, random.Random(0))
    assert PROCESS["SIGTERM all ranks"](job, tmp_path, 1.0, random.Random(0))
    assert sorted(job.wait(30) or []) == [-15, -9] and job.ranks() == []
    assert not PROCESS["SIGKILL all ranks"](job, tmp_path, 1.0, random.Random(0))  # nobody is there to be hit
    hung = Job("alone", 1, [], tmp_path, "hung")
    hung.kill()
    assert not any(psutil.pid_exists(p) for p in [*pids, hung.processes[0].pid])


def test_every_layout_is_started_in_every_way() -> None:
    made = layouts_of([1, 2], [(), ("parallel.tp=2",)])
    assert [str(m) for m in made] == ["1 rank alone", "2 ranks by hand parallel.tp=2", "2 ranks torchrun parallel.tp=2"]
    assert sys.executable in jobs.commands("torchrun", 2, ["c.yaml"])[0][0]


def test_rows_that_are_none_count_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\n{"step": "x"}\n[1]\n{"step": 2, "loss": 1.5}\n{"step": 3')
    assert losses(tmp_path) == [(2, 1.5)] and last_step(tmp_path) == 2


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw(CALM, CALM, [attempt([75]), attempt([0])], tmp_path / "chaos.png")
    assert (tmp_path / "chaos.png").read_bytes().startswith(b"\x89PNG")
