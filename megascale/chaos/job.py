"""The processes of one attempt at a run: starting, watching, signalling, waiting."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIGCONT, SIGKILL, Signals

import psutil

PRETRAIN = ["-m", "megascale", "train"]


def free_port() -> int:
    """A TCP port of the loopback interface that is free at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def commands(launcher: str, ranks: int, arguments: Sequence[str]) -> list[tuple[list[str], dict[str, str]]]:
    """The command line and the additional environment of each process that an attempt starts."""
    pretrain, port = [*PRETRAIN, *arguments], str(free_port())
    if launcher == "torchrun":
        meeting = ["--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", port]
        return [([sys.executable, "-m", "torch.distributed.run", *meeting, *pretrain], {})]
    if launcher == "alone":
        return [([sys.executable, *pretrain], {})]
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [([sys.executable, *pretrain], {**place, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)]


class Job:
    """One attempt. `logs` has a file per started process with its output and its children's."""

    def __init__(self, launcher: str, ranks: int, arguments: Sequence[str], folder: Path, name: str) -> None:
        self.launcher, self.logs, self.processes, self._seen = launcher, [], [], set[psutil.Process]()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "PMI"))}
        for number, (command, more) in enumerate(commands(launcher, ranks, arguments)):
            log = folder / f"{name}-{number}.log"
            with log.open("wb") as out:
                process = subprocess.Popen(
                    command, env={**environment, **more}, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
                )
            self.logs.append(log)
            self.processes.append(process)

    def ranks(self) -> list[int]:
        """Process ids of the living ranks, lowest rank first if known."""
        if self.launcher != "torchrun":
            return [p.pid for p in self.processes if p.poll() is None]
        return sorted(p.pid for p in self._family() if p.pid != self.processes[0].pid and _trains(p))

    def signal(self, pids: Sequence[int], number: Signals) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def running(self) -> bool:
        """Whether any process of the attempt lives, including those whose launcher is gone."""
        return any(p.poll() is None for p in self.processes) or any(_lives(p) for p in self._family())

    def wait(self, seconds: float) -> list[int] | None:
        """The exit codes of the started processes once all are gone, children too; None if that takes longer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self.running():
                return [p.returncode for p in self.processes]
            time.sleep(0.05)
        return None

    def kill(self) -> None:
        """Kills the remaining processes."""
        pids = [p.pid for p in self._family() if _lives(p)]
        self.signal(pids, SIGCONT)
        self.signal(pids, SIGKILL)
        self.wait(10)

    def text(self) -> str:
        return "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in self.logs)

    def _family(self) -> set[psutil.Process]:
        """All processes of the attempt that were ever observed."""
        for process in self.processes:
            with suppress(psutil.Error):
                parent = psutil.Process(process.pid)
                self._seen |= {parent, *parent.children(recursive=True)}
        return self._seen


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _trains(process: psutil.Process) -> bool:
    """Whether this is a rank rather than its launcher; torchrun starts python with -u."""
    try:
        words = [word for word in process.cmdline() if word != "-u"]
        return words[1 : 1 + len(PRETRAIN)] == PRETRAIN
    except psutil.Error:
        return False
