"""Sets up a process among its ranks: device, rendezvous, watchdog and threads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout as set_patience

from megascale.comm.group import check_own_device, interface_mistake, join, open_store
from megascale.comm.roll import roll_call
from megascale.config.schema import Config
from megascale.errors import PeerLostError, UsageError
from megascale.launch.environment import prepare
from megascale.launch.ranks import RankInfo, node_name
from megascale.launch.rendezvous import own_addresses
from megascale.train.device import checked_threads, choose_device, default_threads
from megascale.train.faults.watchdog import Watchdog

WATCH_FIRST = 30.0  # seconds
T = TypeVar("T")


@contextmanager
def process_group(config: Config, ranks: RankInfo) -> Iterator[Watchdog]:
    """Joins the ranks, starts the watchdog, sets threads. Raises UsageError if a device is missing or the ranks' devices differ in kind."""
    wanted = checked_threads(config.run.threads)
    limit, start = config.run.collective_timeout, config.run.start_timeout or config.run.collective_timeout
    if config.run.device != "cpu" and torch.cuda.is_available():
        prepare(Path(config.run_dir), os.environ)
    if ranks.size == 1:
        choose_device(config, ranks)
        torch.set_num_threads(wanted or default_threads(ranks))
        yield Watchdog(ranks, None, limit)
        return
    device, problem = None, interface_mistake(os.environ, own_addresses().values()) or ""
    try:
        device = choose_device(config, ranks)
    except UsageError as error:
        problem = str(error)  # sent to all, since only the first rank prints
    on_cuda = device is not None and device.type == "cuda"
    backend = "nccl" if on_cuda else "gloo"
    if on_cuda and config.parallel.offload:
        backend = "cpu:gloo,cuda:nccl"  # tensors on the host are reduced there
    # The watchdog reports first, since it knows more; the library's own time-out covers the time before the watchdog runs.
    try:
        store = open_store(ranks, start)
    except dist.DistNetworkError as error:
        if ranks.rank == 0:
            raise
        raise PeerLostError(
            f"rank 0 does not answer at {ranks.address}:{ranks.port} within {start:.0f} s ({start_key(config)}): it never started, has "
            f"ended, or cannot be reached from {node_name()}; run the same command again"
        ) from error
    roll_call(store, ranks, "cpu" if device is None else device.type, problem, start + WATCH_FIRST)
    if on_cuda:
        check_own_device(store, ranks, str(torch.cuda.get_device_properties(device).uuid))
    join(store, ranks, backend, max(start, limit) + WATCH_FIRST, device)
    try:
        watch = Watchdog(ranks, store, limit)
        share = default_threads(ranks)  # all ranks take part, since a node may have its own run.threads
        torch.set_num_threads(wanted or share)
        yield watch
    finally:
        dist.destroy_process_group()


def start_key(config: Config) -> str:
    """By which key ranks wait for each other at the start."""
    return "run.collective_timeout" if config.run.start_timeout is None else "run.start_timeout"


def end_start(config: Config, groups: Iterable[dist.ProcessGroup | None]) -> None:
    """Kernels are compiled: from now on the library gives up after run.collective_timeout, where the start was given other seconds."""
    if config.run.start_timeout is None or not dist.is_initialized():
        return
    for group in dict.fromkeys([None, *(g for g in groups if g is not None)]):
        set_patience(timedelta(seconds=config.run.collective_timeout + WATCH_FIRST), group)


def final_barrier() -> None:
    """Waits for all ranks: launchers that kill the remaining ranks when one exits must not interrupt a write."""
    if dist.is_initialized():
        with suppress(RuntimeError):  # a peer that dies now does no harm: the run's state is complete
            dist.barrier()
