"""A device's and its links' rates measured on this machine by several ranks at once: products by size, attention, casts, launches, and
messages by size. Ranks of CPUs share cores and memory, so each one is measured while all the others do the same.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from statistics import fmean
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch.nn import functional as F

from megascale.comm.collectives import gather_into
from megascale.limits import memory_limit
from megascale.measure.compute import KNOWN_PEAKS
from megascale.model.layers import linear


class Sizes(NamedTuple):
    """What is measured: widths of square factors; samples, heads, tokens and channels of attention; numbers of a cast; messages' bytes."""

    products: tuple[int, ...]
    attention: tuple[int, int, int, int]
    copied: int
    messages: tuple[float, ...]


SIZES = {
    "cpu": Sizes((64, 128, 256, 512, 1024), (1, 4, 512, 64), 1 << 22, (1e3, 1e4, 1e5, 1e6, 1e7)),
    "cuda": Sizes((512, 1024, 2048, 4096, 8192), (2, 32, 4096, 128), 1 << 28, (1e4, 1e5, 1e6, 1e7, 1e8, 1e9)),
}
FORMATS = {"cpu": {"fp32": torch.float32, "bf16": torch.bfloat16}, "cuda": {"bf16": torch.bfloat16, "fp32": torch.float32}}
PATIENCE = 300.0  # seconds


def seconds_of(work: Callable[[], Any], device: torch.device, budget: float) -> float:
    """Seconds of `work`: the median of as many repetitions as fit into `budget`, three at least, after one that is not counted."""
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 4 or time.perf_counter() - begun < budget:
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - start)
    counted = sorted(taken[1:])
    return counted[len(counted) // 2]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_device(device: torch.device, sizes: Sizes, budget: float) -> dict[str, Any]:
    """Rates of a device, each measured for `budget` seconds: FLOP/s of products by format and FLOPs, and of attention, bytes/s of a cast,
    and seconds of the smallest kernel with its launch.
    """
    found: dict[str, Any] = {}
    products = {}
    for name, dtype in FORMATS[device.type].items():
        pairs = []
        for width in sizes.products:
            x, y = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
            flops = 2.0 * width**3
            pairs.append((flops, flops / seconds_of(lambda x=x, y=y: linear(x, y), device, budget)))  # type: ignore[misc]
        products[name] = pairs
    found["products"] = products
    attended = next(iter(FORMATS[device.type].values()))
    b, h, s, e = sizes.attention
    q, k, v = (torch.randn(b, h, s, e, device=device, dtype=attended, requires_grad=True) for _ in range(3))

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    # Half of the pairs are masked; two products forward and five backward.
    found["attention"] = 7.0 * b * h * s * s * e / seconds_of(attend, device, budget)
    wide = torch.randn(sizes.copied, device=device)
    found["copied"] = 6.0 * wide.numel() / seconds_of(lambda: wide.to(torch.bfloat16), device, budget)
    small = torch.zeros(8, device=device)
    many = 200

    def launch() -> None:
        for _ in range(many):
            small.add_(1.0)

    found["kernel"] = seconds_of(launch, device, budget) / many
    return found


def measure_links(device: torch.device, ranks: int, messages: Sequence[float], budget: float) -> list[tuple[float, float]]:
    """Pairs of a message's bytes and bytes/s that a rank sends of it, in all-gathers: ranks − 1 messages of a ring each."""
    pairs = []
    for size in messages:
        own = torch.zeros(int(size) // 4, device=device)
        whole = torch.zeros(own.numel() * ranks, device=device)
        # Every rank repeats as often as the first one found right.
        once = torch.tensor([_gathered(whole, own, device, 3)])
        dist.broadcast(once.to(device), 0)
        times = torch.tensor([max(3, min(200, int(budget / float(once))))], device=device)
        dist.broadcast(times, 0)
        pairs.append((4.0 * own.numel(), 4.0 * own.numel() * (ranks - 1) / _gathered(whole, own, device, int(times))))
    return pairs


def _gathered(whole: torch.Tensor, own: torch.Tensor, device: torch.device, times: int) -> float:
    """Mean seconds of an all-gather."""
    gather_into(whole, own)
    dist.barrier()
    wait(device)
    start = time.perf_counter()
    for _ in range(times):
        gather_into(whole, own)
    wait(device)
    return (time.perf_counter() - start) / times


def measure(ranks: int, kind: str, budget: float) -> dict[str, Any]:
    """The means over `ranks` that measure together on this machine. Raises RuntimeError if one of them fails."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        results: Any = context.Queue()
        store = os.path.join(folder, "store")
        started = [
            context.Process(target=_rank, args=(r, ranks, kind, SIZES[kind], budget, store, results), daemon=True) for r in range(ranks)
        ]
        for process in started:
            process.start()
        try:
            found = [results.get(timeout=PATIENCE) for _ in started]
        finally:
            for process in started:
                process.kill()
    failed = [f for f in found if isinstance(f, str)]
    if failed:
        raise RuntimeError(failed[0])
    return joined(found)


def joined(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean rates of ranks that measured the same."""

    def mean(tables: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
        return [(rows[0][0], fmean(rate for _, rate in rows)) for rows in zip(*tables)]

    return {
        "name": found[0]["name"],
        "memory": min(f["memory"] for f in found),
        "products": {name: mean([f["products"][name] for f in found]) for name in found[0]["products"]},
        **{key: fmean(f[key] for f in found) for key in ("attention", "copied", "kernel")},
        "links": mean([f["links"] for f in found]),
    }


def _rank(rank: int, ranks: int, kind: str, sizes: Sizes, budget: float, store: str, results: Any) -> None:
    try:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
        device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(device)
        found: dict[str, Any] = {"links": []}
        if ranks > 1:
            dist.init_process_group(
                "nccl" if kind == "cuda" else "gloo",
                store=dist.FileStore(store, ranks),
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=PATIENCE),
            )
            dist.barrier()
        found |= measure_device(device, sizes, budget)
        if ranks > 1:
            found["links"] = measure_links(device, ranks, sizes.messages, budget)
        results.put({**found, **_facts(device, ranks)})
    except Exception as error:  # told by the process that asked
        results.put(f"rank {rank}: {type(error).__name__}: {error}")


def _facts(device: torch.device, ranks: int) -> dict[str, Any]:
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return {"name": facts.name, "memory": float(facts.total_memory)}
    return {"name": f"1/{ranks} of a CPU" if ranks > 1 else "a CPU", "memory": memory_limit(float(psutil.virtual_memory().total)) / ranks}


def known_peak(name: str) -> float | None:
    """The data sheet's dense bf16 peak of a GPU, if it is known."""
    return next((peak for key, peak in KNOWN_PEAKS.items() if key in name), None)
