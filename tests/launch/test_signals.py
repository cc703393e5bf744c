"""A request to stop, whenever and wherever it comes: one more step, a whole checkpoint, all ranks leave together with 75."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megascale.checkpoint import storage
from megascale.checkpoint.loader import newest
from megascale.config.load import build_config
from megascale.errors import MegascaleError
from megascale.launch.ranks import RankInfo
from megascale.schedule.accumulate import Accumulation
from megascale.train import setup
from megascale.train.stop import ECHO, StopFlag
from tests.ranks import run_ranks
from tests.runs import losses, make_tokens, rows, run, settings

pytestmark = pytest.mark.dist
# Where the blow falls: a function of the run, and its how many-th call.
PHASES: dict[str, tuple[Any, str, int]] = {
    "start": (setup, "open_data", 1),
    "data": (setup, "micro_batches", 3 + 2),  # after the two of the validation set
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
from megascale.train.stop import StopFlag
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
        assert process.stderr.read().count("SIGINT: saving after this step; interrupt again to quit at once") == 1


def test_the_first_reason_stays() -> None:
    """Catches a reason that the launcher's own SIGTERM overwrites while the ranks are leaving."""
    stop = StopFlag()
    stop.heard(signal.SIGUSR1, 0.0)
    stop.heard(signal.SIGTERM, 1.0)
    stop.heard(signal.SIGCHLD, 2.0)
    assert stop.reason == "SIGUSR1" and stop.requested()
