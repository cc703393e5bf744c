"""Runs on a real SLURM: every way in which a job loses its nodes, and the curve that does not notice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megascale.config.load import to_yaml
from tests.launch.slurm import NEEDED, ROOT, Cluster
from tests.ranks import run_ranks
from tests.runs import losses, make_tokens, rows, run, settings

pytestmark = [pytest.mark.slurm, pytest.mark.dist]
missing = [name for name in NEEDED if shutil.which(name) is None] + ([] if os.geteuid() == 0 else ["root"])
if missing:
    pytest.skip(f"SLURM tests need {', '.join(missing)}: tests/launch/cluster/install.sh installs SLURM", allow_module_level=True)
STEPS = 24


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    scripts = ROOT / "tests" / "launch" / "cluster"
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:  # short: it holds sockets
        try:
            subprocess.run([scripts / "start.sh", folder], check=True, timeout=90, stdout=subprocess.DEVNULL)
            yield Cluster(Path(folder))
        finally:
            subprocess.run([scripts / "stop.sh", folder], check=False, timeout=60)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve of one undisturbed process."""
    folder = tmp_path_factory.mktemp("straight")
    make_tokens(folder / "tokens")
    assert run_ranks(1, run, settings(folder, train__steps=STEPS)) == [(0, "done")]
    return losses(folder)


class Place:
    """A run's folder with its config, and the arguments that launch it on CPUs, with a pause in every step until `hurry`."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self.config, self.dir = folder, folder / "tiny.yaml", folder / "run"
        make_tokens(folder / "tokens")
        values = settings(folder, **{"train__steps": STEPS, "checkpoint__every": 100, "run__collective_timeout": 60, **changes})
        self.config.write_text(to_yaml(values))
        slow = folder / "python"
        slow.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -m tests.launch.slow "$@"\n')
        slow.chmod(0o755)
        self.pause = folder / "pause"
        self.pause.write_text("1")
        self.slowly = [self.config, "--python", slow, "--export", f"STEP_PAUSE={self.pause}"]
        self.arguments = [*self.slowly, "--gpus-per-node", 0]

    def hurry(self) -> None:
        self.pause.write_text("0")

    def step(self) -> int:
        """The last step in the metrics; 0 before the first."""
        try:
            return len((self.dir / "metrics.jsonl").read_text().splitlines())
        except FileNotFoundError:
            return 0

    def ending(self) -> dict[str, Any]:
        return json.loads((self.dir / "exit.json").read_text())

    def log(self) -> str:
        return "".join(p.read_text() for p in sorted((self.dir / "launch").glob("*.log")))

    def check_curve(self, straight: list[float]) -> None:
        curve = losses(self.folder)
        assert len(curve) == len(straight)
        assert max(abs(a - b) / b for a, b in zip(curve, straight)) <= 1e-12


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_two_nodes(cluster: Cluster, place: Place, straight: list[float]) -> None:
    """Catches ranks that do not meet, a lost copy of what ran, and exports that do not arrive (the pause needs one)."""
    place.hurry()
    (job,) = cluster.submit(*place.arguments, "--nodes", 2, "--ranks-per-node", 2)
    cluster.wait_state(job, "COMPLETED")
    place.check_curve(straight)
    start = rows(place.folder, "events")[0]
    assert (start["layout"], start["ranks"]) == ("dp_shard4", 4)
    kept = place.dir / "launch"
    assert (kept / f"{job}.yaml").read_text() == place.config.read_text() and "pretrain.py" in (kept / f"{job}.sbatch").read_text()


def test_cancelled_stays_cancelled(cluster: Cluster, place: Place) -> None:
    """Catches a job that comes back from the dead: scancel makes the ranks save and end with 75, as the time limit does."""
    (job,) = cluster.submit(*place.arguments, "--nodes", 2)
    cluster.wait("third step", lambda: place.step() >= 3)
    cluster.call("scancel", job)
    cluster.wait_state(job, "CANCELLED")
    cluster.wait("the end of the ranks", lambda: (place.dir / "exit.json").exists())
    assert place.ending()["code"] == 75 and "SIGTERM" in place.ending()["reason"]
    cluster.wait("an empty queue", lambda: not cluster.call("squeue", "-h"))
    assert cluster.show(job, "Restarts") == "0" and "requeued" not in place.log() and "starting again" not in place.log()


def near_the_limit(cluster: Cluster, place: Place, job: str) -> None:
    """Moves a job's time limit to where SLURM sends its signal, which it does at its next look, within 30 s."""
    place.pause.write_text("2")
    cluster.wait("second step", lambda: place.step() >= 2)
    cluster.call("scontrol", "update", f"jobid={job}", "TimeLimit=2")


def test_time_limit_then_fewer_nodes(cluster: Cluster, place: Place, straight: list[float]) -> None:
    """Catches a job that dies at its time limit, or goes on from elsewhere, or needs as many nodes as before."""
    (job,) = cluster.submit(*place.arguments, "--nodes", "1-2", "--time", 10, "--signal-seconds", 110)
    near_the_limit(cluster, place, job)
    cluster.wait("requeue", lambda: cluster.show(job, "Restarts") == "1")
    cluster.wait_state(job, "PENDING")
    stopped = place.ending()
    assert stopped["code"] == 75 and "SIGUSR1" in stopped["reason"] and 1 <= stopped["step"] < STEPS
    cluster.call("scontrol", "update", f"jobid={job}", "TimeLimit=10")
    place.hurry()
    cluster.call("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test")
    try:
        cluster.start_now(job)
        cluster.wait_state(job, "COMPLETED")
    finally:
        cluster.call("scontrol", "update", "nodename=n[1-2]", "state=resume")
    place.check_curve(straight)
    assert [(e["event"], e["ranks"]) for e in rows(place.folder, "events") if "ranks" in e] == [("start", 2), ("resume", 1)]
    assert place.log().count("start 0, nodes") == place.log().count("start 1, nodes") == 1, "one log for all attempts"


def test_preemption(cluster: Cluster, place: Place, straight: list[float]) -> None:
    """Catches a preempted job that saves, ends before SLURM has requeued it, and is lost as failed."""
    (job,) = cluster.submit(*place.arguments, "--nodes", 2)
    cluster.wait("third step", lambda: place.step() >= 3)
    urgent = cluster.call("sbatch", "--parsable", "-p", "urgent", "--exclusive", "-N3", "-o", "/dev/null", "--wrap", "sleep 1").strip()
    cluster.wait("requeue", lambda: cluster.show(job, "Restarts") == "1")
    assert place.ending()["code"] == 75 and "SIGTERM" in place.ending()["reason"]
    place.hurry()
    cluster.wait_state(urgent, "COMPLETED")
    cluster.start_now(job)
    cluster.wait_state(job, "COMPLETED")
    place.check_curve(straight)


def test_node_failure(cluster: Cluster, tmp_path: Path, straight: list[float]) -> None:
    """Catches a job that does not come back when a node goes, or forgets its newest whole checkpoint."""
    place = Place(tmp_path, checkpoint__every=2)
    (job,) = cluster.submit(*place.arguments, "--nodes", 2)
    cluster.wait("fifth step", lambda: place.step() >= 5)
    os.kill(int((cluster.folder / "slurmd.n2.pid").read_text()), signal.SIGKILL)
    kill_last(job)
    cluster.call("scontrol", "update", "nodename=n2", "state=down", "reason=test")  # SLURM would notice by itself, after minutes
    try:
        place.hurry()
        cluster.wait("requeue", lambda: cluster.show(job, "Restarts") == "1")
        cluster.start_now(job)
        cluster.wait_state(job, "COMPLETED")
        assert cluster.show(job, "NodeList") == "n[1,3]"
    finally:
        cluster.call("slurmd", "-N", "n2")
        cluster.wait("three nodes", lambda: cluster.call("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip() == "3")
    place.check_curve(straight)
    resumed = next(e for e in rows(place.folder, "events") if e["event"] == "resume")
    assert resumed["step"] >= 4


def test_a_killed_rank_starts_again_in_place(cluster: Cluster, tmp_path: Path, straight: list[float]) -> None:
    """Catches a job that gives up, or waits for its time limit, when one process dies."""
    place = Place(tmp_path, checkpoint__every=2)
    (job,) = cluster.submit(*place.arguments, "--nodes", 2)
    cluster.wait("fifth step", lambda: place.step() >= 5)
    place.hurry()
    kill_last(job)
    cluster.wait_state(job, "COMPLETED")
    place.check_curve(straight)
    assert "starting again in 10 s, time 1 of 5" in place.log() and cluster.show(job, "Restarts") == "0"


def kill_last(job: str) -> None:
    """Kills the rank of the highest number of a job, found by its environment."""
    ranks = {}
    for folder in Path("/proc").iterdir():
        try:
            if b"tests.launch.slow" not in (folder / "cmdline").read_bytes():
                continue
            env = dict(line.split(b"=", 1) for line in (folder / "environ").read_bytes().split(b"\0") if b"=" in line)
        except OSError:
            continue
        if env.get(b"SLURM_JOB_ID") == job.encode():
            ranks[int(env[b"SLURM_PROCID"])] = int(folder.name)
    os.kill(ranks[max(ranks)], signal.SIGKILL)


def test_chain(cluster: Cluster, place: Place, straight: list[float]) -> None:
    """Catches links that run side by side, one that is lost with the time limit, and one that does not go on."""
    first, second = cluster.submit(*place.arguments, "--nodes", 1, "--time", 10, "--signal-seconds", 110, "--chain", 2)
    near_the_limit(cluster, place, first)
    cluster.wait_state(first, "COMPLETED")
    # Its exit.json may be gone already: the second link removes it when it starts, and that is at once.
    assert "ended with code 75" in place.log()
    place.hurry()
    cluster.wait_state(second, "COMPLETED")
    place.check_curve(straight)
    assert [e["event"] for e in rows(place.folder, "events") if "ranks" in e] == ["start", "resume"]


def test_array_of_seeds(cluster: Cluster, place: Place) -> None:
    """Catches tasks of an array that share a directory or a seed."""
    place.hurry()
    (job,) = cluster.submit(*place.arguments, "--nodes", 1, "--seeds", "1,2", "train.steps=3")
    cluster.wait("end of both", lambda: not cluster.call("squeue", "-h", "-j", job))
    found = [json.loads((place.folder / f"run-seed{s}" / "metrics.jsonl").read_text().splitlines()[0])["loss"] for s in (1, 2)]
    assert found[0] != found[1]
    assert all(json.loads((place.folder / f"run-seed{s}" / "exit.json").read_text())["code"] == 0 for s in (1, 2))


def test_pools(cluster: Cluster, place: Place, straight: list[float]) -> None:
    """Catches a heterogeneous job whose parts count their ranks apart, or whose replicas lie across the pools."""
    place.hurry()
    (job,) = cluster.submit(*place.slowly, "--pool", "nodes=1,gpus=0,ranks=2", "--pool", "nodes=2,gpus=0")
    cluster.wait_state(job, "COMPLETED")
    place.check_curve(straight)
    assert rows(place.folder, "events")[0]["layout"] == "dp_replicate2·dp_shard2"


def test_torchrun_per_node(cluster: Cluster, place: Place, straight: list[float]) -> None:
    """Catches agents that look for each other by names that do not resolve."""
    (job,) = cluster.submit(place.config, "--gpus-per-node", 0, "--nodes", 2, "--ranks-per-node", 2, "--torchrun")
    cluster.wait_state(job, "COMPLETED")
    place.check_curve(straight)
    assert rows(place.folder, "events")[0]["layout"] == "dp_shard4"


def test_preflight_leaves_out_a_node(cluster: Cluster, place: Place, straight: list[float]) -> None:
    """Catches an unfit node that the job gets again, or one that keeps it from running at all. Rates of a test machine prove nothing."""
    place.hurry()
    sick = place.folder / "sick"
    healthy = place.folder / "python"
    sick.write_text(
        f'#!/bin/sh\ncase "$SLURMD_NODENAME $1" in n1*preflight.py) exit 9;; *preflight.py) shift; '
        f'exec {sys.executable} launchers/preflight.py "$@" --gemm-size 1024 --disk-mb 1 --timeout 15 --share 0.01;; '
        f'esac\nexec {healthy} "$@"\n'
    )
    sick.chmod(0o755)
    (job,) = cluster.submit(
        place.config, "--python", sick, "--export", f"STEP_PAUSE={place.pause}", "--gpus-per-node", 0, "--nodes", 2, "--preflight"
    )
    cluster.wait("requeue", lambda: cluster.show(job, "Restarts") == "1", seconds=60)
    cluster.start_now(job)
    cluster.wait_state(job, "COMPLETED")
    place.check_curve(straight)
    assert cluster.show(job, "ExcNodeList") == "n1" and cluster.show(job, "NodeList") == "n[2-3]"
    assert "unfit: n1: rank 0 did not report" in place.log() and "all is well" in place.log()
