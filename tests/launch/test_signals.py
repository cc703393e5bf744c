"""A request to stop, whenever and wherever it comes: a whole checkpoint, all ranks leave together with 75."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megascale.checkpoint import storage
from megascale.checkpoint.loader import newest
from megascale.config.load import build_config
from megascale.errors import MegascaleError
from megascale.launch.ranks import RankInfo
from megascale.schedule.accumulate import Accumulation
from megascale.train import setup
from megascale.train.faults.gate import Leaving
from megascale.train.faults.stop import ECHO, StopFlag
from megascale.train.faults.watchdog import Activity
from tests.ranks import run_ranks
from tests.runs import losses, make_tokens, rows, run, settings

pytestmark = pytest.mark.dist
# Where the blow falls: a function of the run, and its how many-th call.
PHASES: dict[str, tuple[Any, str, int]] = {
    "start": (setup, "open_data", 1),
    "data": (setup, "micro_batches", 3 + 1),  # after the first of the validation set
    "forward": (Accumulation, "run", 3),
    "save": (storage, "write_shard", 1),
    "evaluation": (Accumulation, "evaluate", 1),
}
CHANGES: dict[str, Any] = {
    "train__steps": 8,
    "train__eval_every": 2,
    "train__eval_steps": 2,
    "data__valid_fraction": 0.2,
    "checkpoint__every": 2,
    "parallel__dp_shard": 2,
}


def struck(values: dict[str, Any], phase: str, number: int) -> tuple[int, str]:
    """Trains on the present ranks; the last rank gets a signal in a phase."""
    rank, size = dist.get_rank(), dist.get_world_size()
    stop = StopFlag()
    stop.listen()
    if rank == size - 1:
        strike(*PHASES[phase], number)
    try:
        with setup.build_trainer(build_config(values), RankInfo(rank, size, rank, size), stop) as trainer:
            trainer.train()
    except MegascaleError as error:
        return error.code, str(error)
    return 0, "done"


def strike(module: Any, name: str, call: int, number: int) -> None:
    real: Callable[..., Any] = getattr(module, name)
    calls = [0]

    def struck_function(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    setattr(module, name, struck_function)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase(tmp_path: Path, phase: str, number: int) -> None:
    """Catches a rank that dies of a signal, leaves alone, stops between steps, or harms the checkpoint being written."""
    make_tokens(tmp_path / "tokens")
    values = settings(tmp_path, **CHANGES)
    codes = run_ranks(2, struck, values, phase, number)
    assert [c for c, _ in codes] == [75, 75], codes
    assert codes[0] == codes[1] and f"{signal.Signals(number).name} on rank 1" in codes[0][1]
    stopped = next(e for e in rows(tmp_path, "events") if e["event"] == "stop")
    assert stopped["reason"] == f"{signal.Signals(number).name} on rank 1"
    latest = newest(tmp_path / "run" / "checkpoints")
    assert latest is not None and latest.name == f"step-{stopped['step']:08d}" and 1 <= stopped["step"] <= 5
    if number == signal.SIGTERM:
        (tmp_path / "straight").mkdir()
        assert run_ranks(2, run, values) == [(0, "done")] * 2
        straight = {**values, "run": {**values["run"], "dir": str(tmp_path / "straight" / "run")}}
        assert run_ranks(2, run, straight) == [(0, "done")] * 2
        assert losses(tmp_path) == losses(tmp_path / "straight")


class Agreeing(Activity):
    """What the watch does in a run of its own: looks into a store, here a file, for where to leave."""

    def __init__(self, file: Path, rank: int, size: int) -> None:
        super().__init__()
        agreement = Leaving(self.gate, dist.FileStore(str(file), size), rank, size)

        def look() -> None:
            while True:
                agreement.look(self.stop.requested())
                time.sleep(0.02)

        threading.Thread(target=look, daemon=True).start()


def left(values: dict[str, Any], point: int) -> tuple[int, str]:
    """Trains on the present ranks; the last one gets a signal at its gate's point `point`, and goes on when all know of it."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    stop = StopFlag()
    stop.listen()
    activity = Agreeing(Path(values["run"]["dir"]).parent / "store", rank, size) if size > 1 else Activity()
    gate, enter, calls = activity.gate, activity.gate.enter, [0]

    def struck() -> None:
        calls[0] += 1
        enter()
        if calls[0] == point and rank == size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            while not (gate._closed if size > 1 else stop.requested()):
                time.sleep(0.01)

    gate.enter = struck  # type: ignore[method-assign]
    try:
        with setup.build_trainer(build_config(values), RankInfo(rank, size, rank, size), stop, activity) as trainer:
            trainer.train()
    except MegascaleError as error:
        return error.code, str(error)
    return 0, "done"


# Eight micro-batches a step and twice as many an evaluation, which follows every other step. The first step has no gate.
POINTS = {"an evaluation": 8 + 3, "a step": 8 + 16 + 3}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("phase", POINTS)
def test_work_is_left_between_micro_batches(tmp_path: Path, ranks: int, phase: str) -> None:
    """Catches an evaluation or a long step that is finished although somebody waits, and a step that is left and leaves a trace."""
    make_tokens(tmp_path / "tokens", 120)
    values = settings(tmp_path, **CHANGES, train__global_batch_size=8 * ranks)
    values["parallel"]["dp_shard"] = ranks
    codes = run_ranks(ranks, left, values, POINTS[phase])
    assert [c for c, _ in codes] == [75] * ranks and all("SIGTERM" in text and "after step 2 of 8" in text for _, text in codes), codes
    latest = newest(tmp_path / "run" / "checkpoints")
    assert [r["step"] for r in rows(tmp_path)] == [1, 2] and latest is not None and latest.name == "step-00000002"
    assert ("valid_loss" in rows(tmp_path)[1]) == (phase == "a step")
    assert [e["step"] for e in rows(tmp_path, "events") if e["event"] == "evaluation_cut_short"] == [2] * (phase == "an evaluation")
    assert run_ranks(ranks, run, values) == [(0, "done")] * ranks
    straight = {**values, "run": {**values["run"], "dir": str(tmp_path / "straight" / "run")}}
    assert run_ranks(ranks, run, straight) == [(0, "done")] * ranks
    assert losses(tmp_path) == losses(tmp_path / "straight")


QUIET: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "ddp": (2, {"engine": "ddp", "dp_replicate": 2, "dp_shard": 1}),
    "fsdp2 without resharding": (2, {"dp_shard": 2, "reshard_after_forward": False}),
    "replicas": (2, {"dp_replicate": 2, "dp_shard": 1}),
    "pp": (2, {"pp": 2}),
    "tp": (2, {"tp": 2}),
    "layered": (2, {"dp_shard": 2, "accumulation": "layered"}),
}


def moved_in_evaluation(values: dict[str, Any], kinds: list[str]) -> dict[str, list[int]]:
    """By layout: what the watch sees of progress at the start of every evaluation step and at the end."""
    found: dict[str, list[int]] = {}
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for kind in kinds:
        own = {**values, "parallel": QUIET[kind][1], "run": {**values["run"], "dir": f"{values['run']['dir']}-{kind.replace(' ', '-')}"}}
        with setup.build_trainer(build_config(own), RankInfo(rank, size, rank, size)) as trainer:
            seen, evaluate, traffic = found.setdefault(kind, []), trainer.engine.evaluate, trainer.model.mesh.traffic

            def looked(batches: Any, seen: list[int] = seen, evaluate: Any = evaluate, traffic: Any = traffic) -> Any:
                seen.append(traffic.moved)
                return evaluate(batches)

            trainer.engine.evaluate = looked  # type: ignore[method-assign]
            trainer.train()
            seen.append(traffic.moved)
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_is_progress(tmp_path: Path, ranks: int) -> None:
    """Catches an evaluation longer than run.collective_timeout that the watch takes for a hang: no layout looks still between batches."""
    make_tokens(tmp_path / "tokens", 120)
    kinds = [k for k, (n, _) in QUIET.items() if n == ranks and not (k == "pp" and torch.__version__.startswith("2.11."))]
    changes = {**CHANGES, "train__steps": 1, "train__eval_every": 1, "train__eval_steps": 3}
    for found in run_ranks(ranks, moved_in_evaluation, settings(tmp_path, **changes), kinds):
        for kind, seen in found.items():
            assert len(seen) == 4 and all(a < b for a, b in pairwise(seen)), (kind, seen)
            # Two micro-batches each, or one count of a schedule that is not left between them.
            assert seen[-1] - seen[0] >= (3 if kind in ("pp", "layered") else 6), (kind, seen)


def test_a_stop_file_is_named(tmp_path: Path) -> None:
    """Catches a stop whose reason nobody can tell afterwards, and a STOP that stays and ends the next start as well."""
    make_tokens(tmp_path / "tokens")
    codes = run_ranks(2, run, settings(tmp_path), 2)
    assert [c for c, _ in codes] == [75, 75] and all("STOP exists" in text for _, text in codes)
    assert not (tmp_path / "run" / "STOP").exists()
    assert run_ranks(2, run, settings(tmp_path)) == [(0, "done")] * 2


STUCK = """
import sys, datetime
import torch.distributed as dist
from megascale.train.faults.stop import StopFlag
stop = StopFlag()
stop.loud = True
stop.listen()
print("ready", flush=True)
dist.HashStore().wait(["never"], datetime.timedelta(seconds=60))
"""


def test_a_second_interrupt_ends_a_hung_process() -> None:
    """Catches a handler that waits for the main thread, which hangs in C++ because a peer is gone; and an echo taken for a second press."""
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(ECHO / 5)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        time.sleep(ECHO * 2)
        assert process.poll() is None, "one interrupt, its echo and SIGTERM only ask"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read().count("SIGINT: stopping with a checkpoint; interrupt again to quit at once") == 1


HEARD = """
import signal, sys, time
from megascale.train.faults.stop import SIGNALS, StopFlag
ignored = sys.argv[1:] == ["nohup"]
if ignored:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
for number in SIGNALS:
    stop = StopFlag()
    stop.loud = True
    stop.listen()
    signal.raise_signal(number)
    deadline = time.monotonic() + (0.5 if ignored and number == signal.SIGHUP else 30)
    while not stop.requested() and time.monotonic() < deadline:
        time.sleep(0.01)
    print(signal.Signals(number).name, stop.reason)
"""


@pytest.mark.parametrize("how", ["", "nohup"])
def test_every_signal_that_says_go(how: str) -> None:
    """Catches a closed terminal or a scheduler's warning that kills at once, and a run under nohup that ends with its terminal."""
    done = subprocess.run([sys.executable, "-c", HEARD, how], capture_output=True, text=True, timeout=100, check=True)
    heard = dict(line.split() for line in done.stdout.splitlines())
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    assert heard == {n: "None" if how and n == "SIGHUP" else n for n in names}
    assert all(f"{n}" in done.stderr for n in names if heard[n] != "None") and done.stderr.count("stopping with a checkpoint") == 6 - bool(
        how
    )


def test_a_stop_that_is_no_file(tmp_path: Path) -> None:
    """Catches a folder STOP that ends the run with a traceback, and a file that cannot be removed and does."""
    stop = StopFlag()
    stop.file = tmp_path / "STOP"
    stop.file.mkdir()
    assert not stop.requested() and stop.file.is_dir()
    stop.file.rmdir()
    stop.file.symlink_to("nowhere")
    assert stop.requested() and stop.reason is not None and "STOP exists" in stop.reason and not stop.file.is_symlink()


def test_the_first_reason_stays() -> None:
    """Catches a reason that the launcher's own SIGTERM overwrites while the ranks are leaving."""
    stop = StopFlag()
    stop.heard(signal.SIGUSR1, 0.0)
    stop.heard(signal.SIGTERM, 1.0)
    stop.heard(signal.SIGCHLD, 2.0)
    assert stop.reason == "SIGUSR1" and stop.requested()
