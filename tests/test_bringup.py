"""The command for a lent device: what it runs next, what it keeps, what a broken step costs, and its table."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import bringup, steps, tables
from benchmarks.gpu.steps import STEPS, Step

HANG = Step("hang", "", "", "http.server 0 --bind 127.0.0.1", 1)  # it never ends by itself


def record(name: str, ended: str = "ok", tiny: bool = False, result: Any = None) -> dict[str, Any]:
    machine = {"torch": "2", "gpu": "G"}
    return {"step": name, "ended": ended, "tiny": tiny, "seconds": 3.0, "machine": machine, "result": result, "tail": "a|b"}


class Forked:
    """A step in a fork of this process, which has torch and the package imported already: the same code in a fraction of the time."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.process = multiprocessing.get_context("fork").Process(target=self.run, args=(words, log))
        self.process.start()
        self.pid = self.process.pid

    @staticmethod
    def run(words: list[str], log: Path) -> None:
        file = os.open(log, os.O_CREAT | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(file), "w", buffering=1) for _ in range(2))
        os.environ.update(bringup.environment(dict(os.environ)), TORCHINDUCTOR_COMPILE_THREADS="1")
        torch.set_num_threads(1)  # OpenMP's threads are not here either
        if "torch._inductor.config" in sys.modules:  # the compiling threads of the forked process are not here
            sys.modules["torch._inductor.config"].compile_threads = 1  # type: ignore[attr-defined]
        os.chdir(bringup.ROOT)
        if words[0] == "-c":
            exec(words[1], {})
            return
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)

    def wait(self, limit: float) -> int:
        self.process.join(limit)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired("step", limit)
        return self.process.exitcode


def test_what_failed_comes_after_what_was_never_tried() -> None:
    """Catches a step that fails and uses up every later call, and a tiny result that counts on a device."""
    names = [step.name for step in STEPS]
    found = {n: record(n) for n in names[2:]} | {names[0]: record(names[0], "over its limit"), names[3]: record(names[3], tiny=True)}
    assert [step.name for step in bringup.missing(found, tiny=False)] == [names[1], names[3], names[0]]
    assert [step.name for step in bringup.missing(found, tiny=True)] == [names[1], names[0]]


# Steps that compile take most of the time, and what they compile other tests compile too.
SLOW = ("1.2b", "8b-budget", "peers", "mixtral")


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([s.name for s in STEPS if s.name not in SLOW], id="eager"),
        pytest.param(list(SLOW), id="compiled", marks=pytest.mark.slow),
    ],
)
def test_it_runs_end_to_end(names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a step that does not start or prints nothing, results that are not kept, a second call that does everything again, a plan
    that is not what is missing, and tiny results that get onto the page.
    """
    import benchmarks.gpu.operators
    import benchmarks.gpu.step  # noqa: F401  what the steps import, once for all

    chosen = tuple(step for step in STEPS if step.name in names)
    monkeypatch.setattr(bringup, "STEPS", chosen)
    monkeypatch.setattr(bringup, "CACHES", tmp_path / "caches")
    (page := tmp_path / "page.md").write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    words = ["--minutes", "30", "--tiny", "--page", str(page), "--out", str(out := tmp_path / "out")]
    assert bringup.main([*words, "--plan"], Forked) == 0
    plan = capsys.readouterr().out
    assert all(step.name in plan and step.tiny in plan for step in chosen) and not out.exists()
    assert bringup.main(words, Forked) == 0
    found = bringup.records(out)
    assert {n: r["ended"] for n, r in found.items()} == dict.fromkeys(names, "ok"), [
        r["tail"] for r in found.values() if r["ended"] != "ok"
    ]
    assert all(found[n]["result"] is not None for n in names if n != "tests")
    assert all(tables.words(r["result"], r["tail"]) for r in found.values())
    assert {path.name for path in out.iterdir()} == {bringup.RESULTS} and "old" in page.read_text()
    capsys.readouterr()
    assert bringup.main([*words, "--plan"], Forked) == 0 and capsys.readouterr().out == ""
    whole = json.loads((out / bringup.RESULTS).read_text())
    assert whole[names[0]]["machine"]["torch"] and whole[names[0]]["clocks"] is not None


def test_a_step_that_hangs_or_dies_costs_its_limit() -> None:
    """Catches a call that outlives its minutes, or its output, and an error that nobody can read afterwards."""
    assert bringup.run(HANG, True, 1.0, {})["ended"] == "over its limit"
    died = bringup.run(replace(HANG, tiny="nothing.of.that.name"), True, 20.0, {})
    assert died["ended"] == "exit code 1" and "nothing" in died["tail"]


class Said:
    """A step that says something and ends."""

    pid = 0

    def __init__(self, text: str, code: int) -> None:
        self.text, self.code = text, code

    def __call__(self, words: list[str], log: Path) -> Said:
        if self.code == -9:
            raise KeyboardInterrupt  # the call itself is ended
        log.write_text(self.text)
        return self

    def wait(self, limit: float) -> int:
        return self.code


def test_each_fault_costs_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a missing package that is a failed step, an error out of memory that nobody sees as one, a call killed in the middle whose
    step comes first again, results that are half written, and a machine without what every step needs.
    """
    out_of_memory = Said('{"step_seconds": 1}\ntorch.OutOfMemoryError: CUDA out of memory', 1)
    ended = bringup.run(HANG, True, 1.0, {}, out_of_memory)
    assert ended["ended"] == "out of memory" and ended["result"] == {"step_seconds": 1}, "what it said before is kept"
    monkeypatch.setattr(
        bringup, "STEPS", (replace(HANG, needs=("no_such_package",)), replace(HANG, name="cut"), replace(HANG, name="next"))
    )
    with pytest.raises(KeyboardInterrupt):
        bringup.run_missing(tmp_path, 9, True, {}, Said("", -9))
    assert "no_such_package not installed" in capsys.readouterr().out
    assert {n: r["ended"] for n, r in bringup.records(tmp_path).items()} == {"cut": bringup.UNFINISHED}
    assert [step.name for step in bringup.missing(bringup.records(tmp_path), True)] == ["hang", "next", "cut"]
    bringup.run_missing(tmp_path, 9, True, {}, Said("{}", 0))
    assert {n: r["ended"] for n, r in bringup.records(tmp_path).items()} == {"cut": "ok", "next": "ok"}
    assert bringup.run_missing(tmp_path / "none", 0, True, {}) == {}, "nothing fits"
    (tmp_path / bringup.RESULTS).write_text('{"cut": {"ste')
    assert bringup.records(tmp_path) == {}
    assert bringup.probe(Said("no libcuda\n", 1)) == {"error": "no libcuda"}
    monkeypatch.setattr(bringup, "BASE", ("torch", "no_such.package"))
    assert bringup.main(["--plan"]) == 2 and "pip install no_such.package" in capsys.readouterr().err


def test_the_driver_needs_nothing(tmp_path: Path) -> None:
    """Catches an import of torch or of any other package by the driver: it must start on every machine; and a path of the caller's that a
    step does not get.
    """
    code = "import sys; import benchmarks.gpu.bringup; assert not {'torch', 'pydantic', 'typer', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=bringup.ROOT)
    assert bringup.environment({"PYTHONPATH": "/site"})["PYTHONPATH"] == f"{bringup.ROOT}{os.pathsep}/site"
    assert bringup.environment({"TRITON_CACHE_DIR": "/mine"})["TRITON_CACHE_DIR"] == "/mine"
    assert "ruamel.yaml" in steps.BASE and bringup.absent(steps.BASE) == []


def test_the_table_says_what_ran_where() -> None:
    """Catches a page that calls a step of another size, or none at all, a result."""
    whole = {"mfu": 0.5, "step_seconds": 0.1, "launches": 9, "peak_bytes": 2e9, "host_waits": ["clip.py:3"]}
    found = {"1.2b": record("1.2b", result=whole), "8b": record("8b", tiny=True, result=whole), "tests": record("tests", "exit code 1")}
    table = tables.table(found)
    assert "| 1.2B in bf16, compiled | G, torch 2 | ok | 3.0 | 100 ms, MFU 0.50, 9 launches, 2.0 GB, host waits at clip.py:3 |" in table
    assert "| eight 8B layers in bf16, compiled | – | not run | | |" in table
    assert "a/b" in table and len(table.splitlines()) == len(STEPS) + 2
    assert tables.words({"step_seconds": 0.1, "mfu": 0.5}, "") == "100 ms, MFU 0.50", "what was printed before it was cut off"


def test_a_page_without_the_marks_is_left_alone(tmp_path: Path) -> None:
    """Catches a table that takes the place of something else."""
    (page := tmp_path / "page.md").write_text("text")
    with pytest.raises(ValueError, match="no place for the table"):
        tables.write_tables({}, page)
    assert page.read_text() == "text"
    assert bringup.last_json('x\n{"a": 1}\n{"b": {"c": 2}}\nend {') == {"b": {"c": 2}}
    assert json.dumps(bringup.last_json("nothing")) == "null"
