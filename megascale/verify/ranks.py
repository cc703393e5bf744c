"""Ranks on this machine for small checks: forked, one thread each, met through a file, with a time-out."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megascale.errors import TrainingError


class RankFailed(TrainingError):
    """A rank raised, died, or did not answer in time; the message has its traceback."""


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """`function(*args)` on `size` gloo ranks forked from this process; the results by rank. Raises RankFailed."""
    context = multiprocessing.get_context("fork")
    results: Any = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(r, size, os.path.join(folder, "store"), results, function, args), daemon=True)
            for r in range(size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(results, ranks, time.monotonic() + timeout, timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(results: Any, ranks: list[Any], deadline: float, timeout: float) -> list[Any]:
    done: dict[int, Any] = {}
    while len(done) < len(ranks):
        while results.empty():
            dead = [r for r, p in enumerate(ranks) if r not in done and p.exitcode not in (None, 0)]
            if dead and results.empty():
                raise RankFailed(f"rank {dead[0]} died with exit code {ranks[dead[0]].exitcode}")
            if time.monotonic() > deadline:
                raise RankFailed(f"no answer from ranks {sorted(set(range(len(ranks))) - set(done))} within {timeout} s")
            time.sleep(0.005)
        rank, result, error = results.get()
        if error is not None:
            raise RankFailed(f"rank {rank} failed:\n{error}")
        done[rank] = torch.load(io.BytesIO(result), weights_only=False)  # our own child's bytes
    return [done[r] for r in range(len(ranks))]


def _rank(rank: int, size: int, store: str, results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if "torch._inductor.config" in sys.modules:  # the compiling threads of the forked process are not here: a rank would wait forever
        sys.modules["torch._inductor.config"].compile_threads = 1  # type: ignore[attr-defined]
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    try:
        if size > 1:
            dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
        packed = io.BytesIO()
        torch.save(function(*args), packed)
        results.put((rank, packed.getvalue(), None))
        if size > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        os._exit(1)
