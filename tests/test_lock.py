"""One job a run directory: who comes second is told, who is gone is replaced, and of two that race one wins."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megascale.errors import UsageError
from megascale.train.start import lock as module
from megascale.train.start.lock import LOCK, Holder, RunLock, started, this_process


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT", 0.05), ("STALE", 0.4), ("LOOK", 0.02)):
        monkeypatch.setattr(module, name, seconds)


def no_loss(why: str) -> None:
    raise AssertionError(why)


def left_by(run_dir: Path, **changes: Any) -> Holder:
    """A lock file of somebody else."""
    run_dir.mkdir(parents=True, exist_ok=True)
    holder = replace(this_process(), **changes)
    (run_dir / LOCK).write_text(json.dumps(asdict(holder)))
    return holder


def test_the_second_is_refused_by_name_and_the_third_comes_after(tmp_path: Path) -> None:
    """Catches two jobs in one directory, a message that does not say who and how to look, and a lock that stays after a clean end."""
    run_dir = tmp_path / "runs" / "a"
    first = RunLock(run_dir, no_loss)
    first.take()
    with pytest.raises(UsageError, match=rf"held by another job: process {os.getpid()} on .*since 20.*ps -fp {os.getpid()}.*STOP"):
        RunLock(run_dir, no_loss).take()
    assert first.holds() and [p.name for p in run_dir.iterdir()] == [LOCK]
    first.release()
    assert not (tmp_path / "runs").exists()  # nothing else was written there
    second = RunLock(run_dir, no_loss)
    second.take()
    assert second.note is None
    (run_dir / "config.yaml").touch()
    second.release()
    assert [p.name for p in run_dir.iterdir()] == ["config.yaml"]


def test_a_dead_holder_here_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a requeue that waits for a process of this machine that is gone, or that another one's number keeps alive."""
    monkeypatch.setattr(module, "STALE", 60.0)
    dead = multiprocessing.get_context("fork").Process(target=int)
    dead.start()
    number, began = dead.pid, started(dead.pid or 0)
    dead.join()
    here = str(started(os.getpid()))
    for pid, start in ((number, began), (os.getpid(), here + "1")):
        left_by(tmp_path, pid=pid, started=start, token="x" * 32)
        lock = RunLock(tmp_path, no_loss)
        lock.take()
        assert lock.note is not None and "which is gone" in lock.note
        lock.release()


def test_an_earlier_start_of_this_machine_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reboot after which a run waits, or a process of now taken for one of then."""
    monkeypatch.setattr(module, "STALE", 60.0)
    parts = module.machine().split()
    if len(parts) != 3:
        pytest.skip("this system does not number its starts")
    left_by(tmp_path, machine=f"{parts[0]} another-boot {parts[2]}", token="x" * 32, started="1")
    lock = RunLock(tmp_path, no_loss)
    lock.take()
    lock.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"node": 1}', "\0\xff"])
def test_a_lock_elsewhere_is_watched_and_not_its_clock(tmp_path: Path, text: str) -> None:
    """Catches a holder on another node judged by two clocks that differ, and a file that nobody can read."""
    if text:
        (tmp_path / LOCK).write_text(text)
    else:
        left_by(tmp_path, machine="elsewhere boot pids", node="elsewhere", token="x" * 32)
    os.utime(tmp_path / LOCK, (time.time() + 9999, time.time() + 9999))  # its clock is ahead
    said: list[str] = []
    lock = RunLock(tmp_path, no_loss)
    lock.take(said.append)
    assert lock.note is not None and "without a heartbeat" in lock.note and "waiting up to" in said[0]
    lock.release()


def test_a_holder_elsewhere_that_lives_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a lock that is broken although its holder gives signs of life."""
    left_by(tmp_path, machine="elsewhere boot pids", node="elsewhere", job="77", look="squeue -j 77", token="x" * 32)
    real = time.sleep

    def sleep(seconds: float) -> None:
        real(seconds)
        os.utime(tmp_path / LOCK, ns=(time.time_ns(), time.time_ns()))

    monkeypatch.setattr(module.time, "sleep", sleep)
    with pytest.raises(UsageError, match=r"on elsewhere, job 77.*squeue -j 77"):
        RunLock(tmp_path, no_loss).take()
    assert json.loads((tmp_path / LOCK).read_text())["node"] == "elsewhere"


def try_to_take(run_dir: str, gate: Any, results: Any, over: Any) -> None:
    lock = RunLock(Path(run_dir), no_loss)
    gate.wait()
    try:
        lock.take()
        results.put("taken")
    except UsageError as error:
        results.put(str(error))
    over.wait()
    lock.release()


@pytest.mark.parametrize("before", ["nothing", "stale here", "stale elsewhere"])
def test_of_those_that_race_one_wins(tmp_path: Path, before: str) -> None:
    """Catches a stale lock that two break, each deleting what the other has just made."""
    for attempt in range(3):
        run_dir = tmp_path / str(attempt)
        if before != "nothing":
            left_by(run_dir, token="x" * 32, started="1", **({} if before == "stale here" else {"machine": "elsewhere boot pids"}))
        context = multiprocessing.get_context("fork")
        gate, over, results = context.Event(), context.Event(), context.Queue()
        racers = [context.Process(target=try_to_take, args=(str(run_dir), gate, results, over)) for _ in range(4)]
        for process in racers:
            process.start()
        gate.set()
        answers = [results.get(timeout=30) for _ in racers]
        over.set()
        for process in racers:
            process.join(10)
        assert sum(a == "taken" for a in answers) == 1, answers
        assert all(a == "taken" or "is held by another job" in a for a in answers)


def test_who_lost_it_is_told_and_writes_no_more(tmp_path: Path) -> None:
    """Catches a frozen job that wakes and writes beside the one that took over, and a lock that a user's rm ends."""
    told: list[str] = []
    lock = RunLock(tmp_path / "run", told.append)
    lock.take()
    lock.check()
    (tmp_path / "run" / LOCK).unlink()
    lock.check()  # made again
    assert lock.holds() and not told
    left_by(tmp_path / "run", node="another", token="x" * 32)
    with pytest.raises(UsageError, match=r"has taken over the run directory .*: process .* on another"):
        lock.check()
    assert any("another" in text for text in told)
    lock.release()
    assert (tmp_path / "run" / LOCK).exists()  # it is not this one's to delete


def test_a_directory_that_is_moved_away(tmp_path: Path) -> None:
    """Catches a run that writes on into a directory that it makes anew, where nobody looks."""
    lock = RunLock(tmp_path / "run", no_loss)
    lock.take()
    os.rename(tmp_path / "run", tmp_path / "moved")
    with pytest.raises(UsageError, match="moved or deleted while the run wrote to it"):
        lock.check()
    time.sleep(0.2)
    assert not (tmp_path / "run").exists()
    os.rename(tmp_path / "moved", tmp_path / "run")
    lock.check()
    lock.release()


def test_disks_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that cannot start where os.link is not to be had, and a file that cannot be written told with a traceback."""

    def none(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    first = RunLock(tmp_path / "run", no_loss)
    first.take()
    with pytest.raises(UsageError, match="is held by another job"):
        RunLock(tmp_path / "run", no_loss).take()
    first.release()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        RunLock(tmp_path / "file" / "run", no_loss).take()
