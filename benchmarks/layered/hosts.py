"""Two "hosts" on one machine: network namespaces joined by a cable whose rate can be limited. Needs root, ip and tc (iproute2)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch.distributed as dist

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "cable"


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Names of the namespaces; gone afterwards."""
    names = [f"megascale-layered-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in zip(names, ADDRESSES):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            for link in ("lo", CABLE):
                _run("ip", "-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def limit(megabits: int | None) -> None:
    """Inside a host: what it sends at most, in Mbit/s; None for no limit."""
    subprocess.run(["tc", "qdisc", "del", "dev", CABLE, "root"], check=False, capture_output=True)
    if megabits is not None:
        rate = ["rate", f"{megabits}mbit", "burst", "256kb", "latency", "400ms"]
        _run("tc", "qdisc", "add", "dev", CABLE, "root", "tbf", *rate)


def limit_all(megabits: int | None, rank: int, per_host: int) -> None:
    """`limit` on every host, with all ranks waiting for it."""
    dist.barrier()
    if rank % per_host == 0:
        limit(megabits)
    dist.barrier()


def timed(
    ways: Mapping[str, Callable[[], object]], bandwidths: Sequence[int | None], rounds: int, rank: int, per_host: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of a step of each way at every bandwidth (None: unlimited), all ranks together; rank 0 prints the standard error.

    Ways and bandwidths take turns in every round, so that a machine that drifts drifts for all of them.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {str(b or "unlimited"): [] for b in bandwidths} for name in ways}
    for _ in range(rounds):
        for bandwidth in bandwidths:
            limit_all(bandwidth, rank, per_host)
            for name, step in ways.items():
                dist.barrier()
                begin = time.perf_counter()
                step()
                dist.barrier()
                seconds[name][str(bandwidth or "unlimited")].append(time.perf_counter() - begin)
                if rank == 0:
                    print(f"{name} at {bandwidth or 'unlimited'}: {time.perf_counter() - begin:.2f} s", file=sys.stderr, flush=True)
    return seconds


def start(host: str, module: str, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """A Python module inside a host, its standard output readable."""
    command = ["ip", "netns", "exec", host, sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip()}; this benchmark needs root and permission for network namespaces")
