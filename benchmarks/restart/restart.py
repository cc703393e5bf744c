"""Seconds from the death of a rank to the next training step on the same machine, and what the watch costs while all is well.

`python -m benchmarks.restart.restart [ROUNDS]`: two ranks under `torchrun --max-restarts`, one of them killed; and, without an elastic
launcher, two plain ranks that are started again when they have ended, as the SLURM script does.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.common import machine, write
from megascale.config.load import to_yaml
from megascale.launch.ranks import RankInfo
from megascale.launch.rendezvous import free_port
from megascale.train.faults.watchdog import HEARTBEAT, Watchdog
from tests.runs import make_tokens, settings

ROOT = Path(__file__).resolve().parents[2]


def config(folder: Path) -> Path:
    make_tokens(folder / "tokens")
    changes: dict[str, Any] = {
        "model__hidden_size": 256,
        "model__num_layers": 4,
        "train__steps": 10**6,
        "train__seq_len": 256,
        "checkpoint__every": 5,
        "precision__compute": "fp32",
        "run__collective_timeout": 60,
    }
    (folder / "run.yaml").write_text(to_yaml(settings(folder, **changes)))
    return folder / "run.yaml"


def rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for(folder: Path, steps: int, after: float = 0.0) -> dict[str, Any]:
    """The first row written later than `after`, once there are `steps` of them."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        later = [r for r in rows(folder) if r["time"] > after]
        if len(later) >= steps:
            return later[0]
        time.sleep(0.02)
    raise TimeoutError(f"no {steps} steps in {folder}")


def ranks_of(pattern: str) -> list[int]:
    """Processes of pretrain.py by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if pattern.encode() in words and any(w.endswith(b"pretrain.py") for w in words) and b"torch.distributed.run" not in words:
                env = dict(line.split(b"=", 1) for line in (folder / "environ").read_bytes().split(b"\0") if b"=" in line)
                found[int(env[b"RANK"])] = int(folder.name)
        except (OSError, KeyError):
            continue
    return [found[r] for r in sorted(found)]


def under_torchrun(folder: Path) -> float:
    """torchrun's agent notices the death, ends the other rank and restarts both."""
    file = config(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3", "pretrain.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    agent = subprocess.Popen([*command, str(file)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(folder, 12)
        killed = time.time()
        os.kill(ranks_of(str(file))[1], signal.SIGKILL)
        time.sleep(0.5)  # rows of the step under way
        return float(wait_for(folder, 1, killed + 0.5)["time"]) - killed
    finally:
        agent.kill()
        agent.wait()
        for process in ranks_of(str(file)):
            os.kill(process, signal.SIGKILL)


def plain_ranks(folder: Path) -> float:
    """The survivor names the dead rank and ends with 5; then all are started again, without the pause that a script may add."""
    file = config(folder)
    ranks = start_ranks(file)
    try:
        wait_for(folder, 12)
        killed = time.time()
        ranks[1].kill()
        assert ranks[0].wait(60) == 5
        ranks = start_ranks(file)
        return float(wait_for(folder, 1, killed + 0.5)["time"]) - killed
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def start_ranks(file: Path) -> list[subprocess.Popen[bytes]]:
    port = str(free_port(str(time.time())))
    started = []
    for r in range(2):
        own = {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env = {**os.environ, **own, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "pretrain.py", str(file)]
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    return started


def beat_seconds(peers: int) -> float:
    """Seconds of one beat on rank 0, which reads all: posting, the heartbeat file aside, reading `peers` beats and judging them."""
    port = free_port("beats")
    store = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    watch = Watchdog(RankInfo(0, peers), store, 600.0)
    watch._closed.set()
    time.sleep(1.5 * HEARTBEAT)
    assert watch.store is not None
    text = watch.store.get("0").decode() if watch.store.check(["0"]) else None
    watch._post()
    text = text or watch.store.get("0").decode()
    for r in range(1, peers):
        watch.store.set(str(r), text.replace('"rank": 0', f'"rank": {r}'))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        watch._post()
        watch._verdict()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    result: dict[str, Any] = {}
    for name, measure in (("torchrun_max_restarts", under_torchrun), ("plain_ranks_started_again", plain_ranks)):
        seconds = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                seconds.append(round(measure(Path(folder)), 2))
        result[name] = seconds
        print(name, seconds, flush=True)
    beats = {peers: beat_seconds(peers) for peers in (2, 64, 512)}
    shares = {str(p): {"milliseconds_a_beat": round(s * 1e3, 3), "share_of_a_core": round(s / HEARTBEAT, 5)} for p, s in beats.items()}
    facts = {"machine": machine(), "seconds_from_kill_to_next_step": result, "watch_on_rank_0_by_ranks": shares}
    write(__file__, "restart", facts)


if __name__ == "__main__":
    main()
