"""Asks a process of its own to trace ranks of a run, and makes a report of its facts. Imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascale.config.schema import Config
from megascale.errors import UsageError
from megascale.planning.cluster import Cluster, load_cluster
from megascale.trace.rates import check_size

TESTED = ("2.12.", "2.13.")  # versions of torch on which tests have traced
WORDS = ("first", "middle", "last")
PATIENCE = 3600.0  # seconds


class TraceFailedError(Exception):
    """The message says why, in a line."""


@dataclass(frozen=True)
class Asked:
    """What to trace: `of` as in --rank, the cluster's file if not an H100's, and the folder and stem of pictures."""

    of: str = "first"
    cluster: str | None = None
    beside: Path | None = None


def ranks_asked(words: str, ranks: int) -> list[int]:
    """ "first,middle,last" or numbers → ranks, each once. Raises UsageError."""
    places = {"first": 0, "middle": ranks // 2, "last": ranks - 1}
    found = []
    for word in (part.strip() for part in words.split(",")):
        if word not in WORDS and not word.isdecimal():
            raise UsageError(f"--rank is {words}: name first, middle, last or numbers from 0 to {ranks - 1}, with commas between")
        rank = places[word] if word in WORDS else int(word)
        if rank >= ranks:
            raise UsageError(f"--rank names rank {rank}, but the run has {ranks}, counted from 0: choose one of them, or more --ranks")
        found.append(rank)
    return list(dict.fromkeys(found))


def with_pools(asked: list[int], cluster: Cluster, ranks: int) -> list[int]:
    """The ranks asked for, and one rank of every pool in use that none of them is in: pools differ in memory and speed."""
    seen, found, first = {cluster.node_of(rank)[0] for rank in asked}, list(asked), 0
    for i, pool in enumerate(cluster.pools):
        if first < ranks and i not in seen:
            found.append(first)
        first += pool.gpus
    return found


def cluster_of(path: str | None, ranks: int) -> Cluster:
    """The cluster of a file; without one, enough nodes of 8 H100 with 80 GB."""
    if path is not None:
        cluster = load_cluster(path)
        check_size(cluster, ranks)
        return cluster
    cluster = Cluster.model_validate(DEFAULT)
    pool = cluster.pools[0]
    nodes = max(pool.nodes, -(-ranks // pool.gpus_per_node))
    return cluster.model_copy(update={"pools": (pool.model_copy(update={"nodes": nodes}),)})


# As configs/clusters/h100-pod.yaml, which has the sources.
DEFAULT: dict[str, Any] = {
    "name": "nodes of 8 H100 80 GB",
    "pools": [
        {
            "name": "h100",
            "nodes": 1,
            "gpus_per_node": 8,
            "device": {
                "name": "H100 80 GB",
                "memory_bytes": 85.0e9,
                "reserve_bytes": 4.0e9,
                "peak_flops": {"fp8": 1979e12, "bf16": 989e12, "fp32": 67e12, "fp64": 67e12},
                "product_share": 0.74,
                "attention_share": 0.46,
                "memory_bytes_per_second": 2.9e12,
            },
            "inside": {"bytes_per_second": 360e9, "latency_seconds": 3e-6},
            "between": {"bytes_per_second": 45e9, "latency_seconds": 8e-6},
        }
    ],
}


def trace(config: Config, ranks: int, asked: Asked) -> dict[str, Any]:
    """The facts of the traced ranks (rank.py: `facts_of`), by rank. Raises TraceFailedError with a sentence."""
    cluster = cluster_of(asked.cluster, ranks)
    of = with_pools(ranks_asked(asked.of, ranks), cluster, ranks)
    refuse(config)
    plain = config.plain()
    plain["parallel"]["compile"] = False
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        stem = asked.beside
        files = {
            "chrome": str(stem.with_suffix(".trace.json")) if stem else "",
            "picture": str(stem.with_suffix(".memory.png")) if stem else "",
        }
        request.write_text(
            json.dumps({"config": plain, "ranks": ranks, "of": of, "cluster": cluster.model_dump(mode="json"), **files}), encoding="utf-8"
        )
        run_child(request, answer)
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return {**found, "cluster": cluster, "files": [name for name in files.values() if name]}


def refuse(config: Config) -> None:
    """Raises TraceFailedError for what cannot be traced."""
    p = config.parallel
    if p.engine == "deepspeed":
        raise TraceFailedError("DeepSpeed's engine cannot be traced: its kernels are not torch's")
    if "activations" in p.offload:
        raise TraceFailedError("offloaded activations cannot be traced: which tensor is a block's input is decided by its address")
    if p.recompute == "budget":
        raise TraceFailedError("parallel.recompute budget cannot be traced: the compiler chooses what is kept")
    if p.tp_async:
        raise TraceFailedError("parallel.tp_async cannot be traced: it needs torch.compile")
    if config.precision.fp8 == "dynamic":
        raise TraceFailedError("precision.fp8 dynamic cannot be traced: torchao's kernels are not torch's")


def run_child(request: Path, answer: Path) -> None:
    """Raises TraceFailedError if the process fails, whatever way it ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # of a launcher around this process
        environment.pop(name, None)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", "-m", "megascale.trace.child", str(request), str(answer)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise TraceFailedError(f"the tracing process was still running after {PATIENCE:.0f} s") from None
    if done.returncode == 0 and answer.exists():
        return
    last = next((line for line in reversed(done.stderr.strip().splitlines()) if line.strip()), f"it ended with code {done.returncode}")
    raise TraceFailedError(f"the tracing process failed: {last.strip()[:300]}{_version_note()}")


def _version_note() -> str:
    from importlib.metadata import version

    found = version("torch")
    return "" if found.startswith(TESTED) else f" (torch is {found}; tracing was tested with {', '.join(f'{v}x' for v in TESTED)})"
