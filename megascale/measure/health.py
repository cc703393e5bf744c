"""Measures a rank alone, with a partner and with all others: the numbers of the preflight."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from megascale.comm.gather import gather_json
from megascale.launch.ranks import RankInfo, node_name
from megascale.measure.compute import gemm_rate

GB = 1e9
CLOCK_ROUNDS = 5


@dataclass(frozen=True)
class Health:
    """One rank by itself. Rates are the best of a few repeats, to measure the hardware rather than its other load."""

    rank: int
    node: str
    gemm_tflops: float
    memory_gb_per_second: float
    free_memory_gb: float
    disk_mb_per_second: float | None  # None on ranks whose node another rank measured
    free_disk_gb: float
    versions: dict[str, str]


def examine(ranks: RankInfo, device: torch.device, folder: Path, gemm_size: int, disk_mb: int) -> Health:
    """Measures this rank. `folder`: where the run will write; one rank per node writes a file there, with fsync, and deletes it again."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    disk = disk_rate(folder / f".preflight-{node_name()}-{ranks.rank}", disk_mb) if ranks.local_rank == 0 else None
    return Health(
        ranks.rank,
        node_name(),
        gemm_rate(device, dtype, gemm_size) / 1e12,
        copy_rate(device) / GB,
        free_memory(device) / GB,
        None if disk is None else disk / 1e6,
        psutil.disk_usage(str(folder)).free / GB,
        versions(device),
    )


def versions(device: torch.device) -> dict[str, str]:
    """Versions that must be equal on all ranks."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        driver = Path("/sys/module/nvidia/version")
        found["driver"] = driver.read_text().strip() if driver.exists() else "unknown"
    return found


def copy_rate(device: torch.device, megabytes: int = 256, repeats: int = 3) -> float:
    """Bytes per second read and written by the fastest copy within the device's memory."""
    source = torch.ones(megabytes * 250_000, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for i in range(repeats + 1):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i:
            best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def free_memory(device: torch.device) -> float:
    """Bytes."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else float(psutil.virtual_memory().available)


def disk_rate(path: Path, megabytes: int) -> float:
    """Bytes per second written and synchronized to the disk. Raises OSError if that fails."""
    block = os.urandom(1 << 20)
    start = time.perf_counter()
    try:
        with open(path, "wb") as file:
            for _ in range(megabytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return megabytes * len(block) / (time.perf_counter() - start)
    finally:
        path.unlink(missing_ok=True)


def clock_skew(ranks: RankInfo) -> float:
    """Seconds by which this node's clock is ahead of rank 0's, collective; accurate to the time in which a barrier releases all ranks."""
    ahead = []
    for _ in range(CLOCK_ROUNDS if ranks.size > 1 else 0):
        dist.barrier()
        now = gather_json(time.time())
        ahead.append(now[ranks.rank] - now[0])
    return statistics.median(ahead) if ahead else 0.0


def tournament(players: int) -> Iterator[list[tuple[int, int]]]:
    """Rounds of disjoint pairs in which every pair meets once (the circle method)."""
    seats: list[int | None] = [*range(players), *([None] if players % 2 else [])]
    for _ in range(len(seats) - 1):
        pairs = [(seats[i], seats[-1 - i]) for i in range(len(seats) // 2)]
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def link_rate(partner: int, first: bool, device: torch.device, megabytes: int, repeats: int = 2) -> float:
    """Bytes per second that reach the partner, the best of a few; both call, and the message goes back and forth."""
    message = torch.ones(megabytes * 250_000, device=device)
    best = float("inf")
    for i in range(repeats + 1):
        start = time.perf_counter()
        for sends in (first, not first):
            dist.send(message, partner) if sends else dist.recv(message, partner)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i:
            best = min(best, time.perf_counter() - start)
    return 2 * message.nbytes / best


def collective_rates(ranks: RankInfo, device: torch.device, megabytes: int) -> dict[str, float]:
    """GB per second of an all-reduce and an all-gather over all ranks, counted as bytes that each rank must send."""
    n = ranks.size
    whole = torch.ones(megabytes * 250_000 // n * n, device=device)
    part = whole[: whole.numel() // n].clone()
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    result = {}
    for name, share, call in (
        ("all_reduce", 2 * (n - 1) / n, lambda: dist.all_reduce(whole)),
        ("all_gather", (n - 1) / n, lambda: gather(whole, part)),
    ):
        best = float("inf")
        for i in range(3):
            dist.barrier()
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i:
                best = min(best, time.perf_counter() - start)
        result[name] = share * whole.nbytes / best / GB
    return result


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
