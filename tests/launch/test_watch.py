"""Lost and hung ranks: every living rank names them within a set time and exits with code 5."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megascale.comm.mesh import Traffic
from megascale.config.load import to_yaml
from megascale.launch.exits import Exit
from megascale.launch.ranks import RankInfo
from megascale.launch.rendezvous import free_port
from megascale.train.faults.lived import LivedClock
from megascale.train.faults.watchdog import (
    GONE,
    HEARTBEAT,
    SAVING,
    STARTING,
    Heartbeat,
    PeerView,
    Watchdog,
    find_hang,
    find_lost_peer,
    words_of,
)
from tests.runs import make_tokens, rows, settings

ROOT = Path(__file__).resolve().parents[2]


def views(*heartbeats: Heartbeat, heard: float = 100.0, moved: float = 100.0) -> list[PeerView]:
    return [PeerView(b, heard, moved) for b in heartbeats]


A = Heartbeat(0, "n1", 7, 41, "training", 310, "all_reduce over dp_shard")
B = Heartbeat(1, "n2", 7, 41, "training", 309, "all_gather over tp")


def test_all_is_well() -> None:
    """Catches alarms while anything moves, while kernels compile, while a slow disk is written, and when a rank has left as it should."""
    assert find_hang(views(A, B), 105, silence=10, limit=10) is None
    one_moves = [PeerView(A, 200, 100), PeerView(B, 200, 195)]
    assert find_hang(one_moves, 200, silence=10, limit=10) is None
    for phase in (STARTING, SAVING):
        still = views(replace(A, phase=phase), replace(B, phase=phase), heard=200)
        assert find_hang(still, 200, silence=10, limit=10) is None
    assert find_hang(views(replace(A, phase=GONE), moved=200), 200, silence=10, limit=10) is None


def test_many_ranks_beat_less_often() -> None:
    """Catches a first rank that is busy reading heartbeats, and ranks that count as silent before their next one is due."""
    few, many = (Watchdog(RankInfo(0, size), None, 30.0) for size in (64, 16384))
    for watch in (few, many):
        watch._closed.set()
    assert (few.every, few.silence) == (1.0, 30.0)
    assert many.every > 10 and many.silence >= 4 * many.every


def test_a_silent_rank_is_named() -> None:
    """Catches a lost node that goes unnoticed because nobody's library sees its connection close."""
    text = find_hang([PeerView(A, 130, 130), PeerView(B, 100, 100)], 130, silence=20, limit=600)
    assert text == "rank 1 on n2 is silent for 30 s (step 41, training, last collective all_gather over tp)"


def test_the_rank_behind_is_named() -> None:
    """Catches a verdict that names one of those that wait instead of the one that they wait for."""
    text = find_hang(views(A, B, heard=130), 130, silence=20, limit=20)
    assert text is not None and "rank 1 on n2 is behind (step 41, training, last collective all_gather over tp)" in text
    assert "rank 0 on n1 waits (step 41, training, last collective all_reduce over dp_shard)" in text
    equal = find_hang(views(A, replace(A, rank=1), heard=130), 130, silence=20, limit=20)
    assert equal is not None and "network" in equal and "run.collective_timeout" in equal


class DeviceEvent:
    """Done once the device has come so far: its number is at most `at`."""

    at = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def query(self) -> bool:
        return self.number <= DeviceEvent.at


def test_what_the_device_has_come_to_counts() -> None:
    """Catches a watch on GPUs that sees all ranks at the same place: each host has queued its whole step before any device is in it."""
    beats = []
    for rank, at in ((0, 5), (1, 4)):
        traffic, made = Traffic(), count(1)
        traffic.mark = lambda made=made: DeviceEvent(next(made))  # type: ignore[misc]
        for i in range(9):
            traffic.add("tp", f"all_gather {i}", 8)
        DeviceEvent.at = at
        beats.append(Heartbeat(rank, f"n{rank}", 7, 41, "training", *traffic.reached()))
    assert [b.moved for b in beats] == [5, 4]
    text = find_hang(views(*beats, heard=130), 130, silence=20, limit=20)
    assert text is not None and "rank 1 on n1 is behind (step 41, training, last collective all_gather 3 over tp)" in text
    DeviceEvent.at = 9
    traffic.moved += 1  # a micro-batch begins
    assert traffic.reached() == (10, "all_gather 8 over tp")


def test_a_hung_save_ends_at_last() -> None:
    """Catches a dead file system that holds the nodes for ever."""
    saving = views(replace(A, phase=SAVING), replace(B, phase=SAVING), heard=1000)
    assert find_hang(saving, 1000, silence=20, limit=100) is None
    assert find_hang(saving, 1400, silence=1000, limit=100) is not None


def test_blame() -> None:
    """Catches a report of a closed connection that does not say whose, or accuses one that left because of another."""
    later = replace(B, count=9)
    assert find_lost_peer([A, B], [replace(A, count=9), later]) is None
    assert find_lost_peer([A, B], [A, later]) == f"rank 0 on n1 is gone ({A.place})"
    assert find_lost_peer([A, B], [replace(A, phase=GONE), later]) is None
    told = find_lost_peer([A, B], [A, replace(later, ending="code 1, ValueError: odd")])
    assert told == f"rank 1 on n2 left ({B.place}): code 1, ValueError: odd"


def test_frozen_time_is_no_time() -> None:
    """Catches a job that was suspended as a whole and calls its peers lost when it wakes, and a freeze that nobody is told of."""
    real = [1000.0]
    clock = LivedClock(lambda: real[0])
    seen = views(A, B, heard=clock.now(), moved=clock.now())
    for step in (1.0, 2.0, 83.0, 1.0):
        real[0] += step
        now = clock.now()
        assert find_hang(seen, now, silence=10, limit=10) is None
    assert now == 5.0 and clock.frozen() == 83.0 == clock.last_frozen and clock.frozen() == 0.0
    real[0] += 4.0
    clock.now()
    real[0] += 4.0
    assert find_hang(seen, clock.now(), silence=10, limit=10) is not None, "a peer that is silent while this rank lives is lost"


GARBAGE = [
    b"[]",
    b"\xff",
    b"{",
    b"null",
    b"3",
    b'{"rank": 1}',
    b'{"rank": 0, "node": "x"}',
    b'{"rank": 1, "node": [], "x": 1}',
    b"[" * 9999,
]


def test_garbage_in_the_store() -> None:
    """Catches a watch that dies of what a stranger writes: the job would end, or hang unseen."""
    store = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    watch = Watchdog(RankInfo(0, 2, 0, 2), store, 500.0)
    try:
        inside = dist.PrefixStore("watch", store)
        inside.set("1", json.dumps(asdict(B)))
        assert watch._heartbeats()[1] == B
        for text in GARBAGE:
            inside.set("1", text.decode("latin-1"))
            inside.set("0", text.decode("latin-1"))
            assert watch._heartbeats()[1] == B
        inside.set("stop", "")
        inside.set("passed/1", "many")
        time.sleep(3 * HEARTBEAT)
        assert {"beats", "watch"} <= {t.name for t in threading.enumerate()} and watch._heartbeats()[0].count > 2
    finally:
        watch.leaves(Exit(0, "done"))


def test_a_verdict_is_one_line() -> None:
    """Catches control characters of a stranger that reach the terminal, and bytes that are no text."""
    assert words_of(b"rank 1\n\x1b[2J is \xff lost") == "rank 1  [2J is \ufffd lost" and len(words_of(b"x" * 10**6)) == 4000


class Job:
    """Two ranks of a run that would take for ever, started as torchrun would start them."""

    def __init__(self, folder: Path, program: list[str], **changes: Any) -> None:
        make_tokens(folder / "tokens")
        config = folder / "tiny.yaml"
        values = {"train__steps": 10**6, "checkpoint__every": 10**6, "run__collective_timeout": 4, "parallel__dp_shard": 2, **changes}
        config.write_text(to_yaml(settings(folder, **values)))
        env = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "OMPI_", "PMI"))}
        port = str(free_port(str(folder)))
        self.folder, self.run = folder, folder / "run"
        self.ranks = []
        for r in range(2):
            own = {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            full = {**env, **own, "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "FOLDER": str(folder)}
            with open(folder / f"rank{r}.err", "w") as errors:
                command = [sys.executable, *program, str(config)]
                self.ranks.append(subprocess.Popen(command, cwd=ROOT, env=full, stdout=subprocess.DEVNULL, stderr=errors))

    def wait_for_step(self, step: int) -> None:
        deadline, file = time.monotonic() + 60, self.run / "metrics.jsonl"
        while not file.exists() or file.read_text().count("\n") < step:
            assert time.monotonic() < deadline, "the run does not begin"
            time.sleep(0.05)

    def ending(self, rank: int) -> tuple[int, dict[str, Any], str]:
        code = self.ranks[rank].wait(40)
        return code, json.loads((self.run / "exit.json").read_text()), (self.folder / f"rank{rank}.err").read_text()


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        for process in job.ranks:
            process.kill()
            process.wait()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("victim", "number"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
        (0, signal.SIGSTOP),
    ],
)
def test_a_lost_rank(tmp_path: Path, jobs: list[Job], victim: int, number: signal.Signals) -> None:
    """Catches survivors that wait for ever, leave with another code, keep no stacks, or cannot say who is gone."""
    job = Job(tmp_path, ["pretrain.py"])
    jobs.append(job)
    job.wait_for_step(3)
    time.sleep(2 * HEARTBEAT)
    os.kill(job.ranks[victim].pid, number)
    start = time.monotonic()
    code, ending, errors = job.ending(1 - victim)
    assert code == ending["code"] == 5 and time.monotonic() - start < 20
    assert f"rank {victim} " in ending["reason"] and "run the same command again" in ending["reason"] and "Traceback" not in errors
    assert ending["step"] >= 3 and ending["rank"] == 1 - victim
    assert "trainer.py" in (job.run / "stacks" / f"rank-{1 - victim:05d}.txt").read_text()
    assert "step " in ending["reason"] and "last collective" in ending["reason"]
    if number == signal.SIGSTOP:
        job.ranks[victim].send_signal(signal.SIGCONT)
        assert job.ending(victim)[:2] == (5, ending), "a rank that wakes writes its own story over the right one"


@pytest.mark.dist
def test_a_rank_that_hangs(tmp_path: Path, jobs: list[Job]) -> None:
    """Catches a hang with all processes alive: the one that reads no data is named, not the one that waits in a collective."""
    job = Job(tmp_path, ["-m", "tests.launch.hang"])
    jobs.append(job)
    code, ending, _ = job.ending(0)
    assert code == ending["code"] == job.ranks[1].wait(20) == 5
    assert "rank 1 " in ending["reason"] and "is behind" in ending["reason"] and "rank 0 " in ending["reason"]
    stacks = [(job.run / "stacks" / f"rank-{r:05d}.txt").read_text() for r in range(2)]
    deepest = r'\(most recent call first\):\n  File "\S*hang.py", line \d+ in train_step'
    assert re.search(deepest, stacks[1]) and not re.search(deepest, stacks[0])
    assert rows(tmp_path)[-1]["step"] == 4


@pytest.mark.dist
def test_a_rank_with_a_bug(tmp_path: Path, jobs: list[Job]) -> None:
    """Catches a peer that calls a rank lost which has left with an error of its own, whose text is what one needs."""
    job = Job(tmp_path, ["-m", "tests.launch.hang"], run__name="bug")
    jobs.append(job)
    assert job.ranks[1].wait(60) == 1
    code = job.ranks[0].wait(20)
    assert (
        code == 5 and "rank 1 on " in (tmp_path / "rank0.err").read_text() and "ValueError: a bug" in (tmp_path / "rank0.err").read_text()
    )
