"""Two "hosts" on one machine: network namespaces joined by a cable whose rate can be limited. Needs root, ip and tc (iproute2)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
    name: str, step: Callable[[], object], bandwidths: Sequence[int | None], steps: int, rank: int, per_host: int
) -> dict[str, list[float]]:
    """Seconds of each of `steps` steps at every bandwidth (None: unlimited), all ranks together; rank 0 tells standard error."""
    result: dict[str, list[float]] = {}
    for bandwidth in bandwidths:
        limit_all(bandwidth, rank, per_host)
        seconds = []
        for _ in range(steps):
            dist.barrier()
            begin = time.perf_counter()
            step()
            dist.barrier()
            seconds.append(time.perf_counter() - begin)
        result[str(bandwidth or "unlimited")] = seconds
        if rank == 0:
            print(f"{name} at {bandwidth or 'unlimited'}: {seconds}", file=sys.stderr, flush=True)
    return result


def start(host: str, module: str, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """A Python module inside a host, its standard output readable."""
    command = ["ip", "netns", "exec", host, sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip()}; this benchmark needs root and permission for network namespaces")
