"""A real SLURM of three virtual nodes, started for the tests, and what they ask it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "munged")


@dataclass(frozen=True)
class Cluster:
    folder: Path

    def call(self, *command: object, cwd: Path = ROOT) -> str:
        """A command with this cluster's configuration; its output."""
        env = {n: v for n, v in os.environ.items() if not n.startswith("SLURM_")}
        done = subprocess.run(
            [str(c) for c in command],
            env={**env, "SLURM_CONF": str(self.folder / "slurm.conf")},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: object) -> list[str]:
        """Job numbers that `launchers/slurm.py … --submit` prints."""
        return re.findall(r"submitted job (\d+)", self.call(sys.executable, "launchers/slurm.py", *arguments, "--submit"))

    def show(self, job: str, key: str) -> str:
        match = re.search(rf"\b{key}=(\S*)", self.call("scontrol", "show", "job", job))
        assert match is not None
        return match[1]

    def wait(self, what: str, condition: Callable[[], object], seconds: float = 45) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} within {seconds} s\n{self.call('scontrol', 'show', 'job')}"
            time.sleep(0.2)

    def wait_state(self, job: str, *states: str) -> None:
        self.wait(f"{states} of job {job}", lambda: self.show(job, "JobState") in states)

    def start_now(self, job: str) -> None:
        """A requeued job waits two minutes, so that what is left of it is gone; here only until that is so."""
        self.wait_state(job, "PENDING")
        self.wait("end of what is left", lambda: not self.call("squeue", "-h", "-t", "COMPLETING"))
        time.sleep(1)
        self.call("scontrol", "update", f"jobid={job}", "StartTime=now")
