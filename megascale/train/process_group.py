"""Where a process runs: its device, its ranks, and how they come to one decision."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from megascale.comm.agreement import Agreement
from megascale.comm.group import check_own_device, interface_mistake, join, open_store
from megascale.comm.roll import roll_call
from megascale.config.schema import Config
from megascale.errors import MegascaleError, PeerLostError, UsageError
from megascale.launch.devices import device_index
from megascale.launch.ranks import RankInfo, node_name
from megascale.launch.rendezvous import own_addresses
from megascale.limits import core_quota, own_cores, slurm_cores
from megascale.train.faults.watchdog import Watch

WATCH_FIRST = 30.0  # seconds
FP8_CAPABILITY = (8, 9)  # from which on CUDA devices multiply FP8: Ada, Hopper and newer
T = TypeVar("T")


def choose_device(config: Config, ranks: RankInfo) -> torch.device:
    wanted = config.run.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("run.device is cuda and torch finds no CUDA device here: use auto or cpu")
    device = torch.device("cuda", device_index(ranks, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    capability = torch.cuda.get_device_capability(device)
    if config.precision.fp8 != "false" and capability < FP8_CAPABILITY:
        raise UsageError(
            f"precision.fp8 is {config.precision.fp8} and {torch.cuda.get_device_name(device)} has compute capability {capability}: FP8 "
            f"products need {FP8_CAPABILITY}; use precision.fp8 false, which is the same model in precision.compute"
        )
    return device


class Seat(NamedTuple):
    """Where a rank stands: its node, and the cores that it may run on, a bit each."""

    node: str
    cores: int


def own_seat() -> Seat:
    return Seat(node_name(), sum(1 << core for core in own_cores()))


def share_of_cores(seat: Seat, everyone: Sequence[Seat], given: int | None, quota: int | None) -> int:
    """The threads of a rank at `seat`: its part of cores that others on its node run on too, all of cores that it alone is bound to.

    given  the cores that the launcher gave it, bound to them or not
    quota  the cores that all ranks of the node may keep busy together
    """
    neighbours = [other for other in everyone if other.node == seat.node]
    cores = seat.cores.bit_count()
    share = min(cores, given) if given else cores // max(1, sum(bool(other.cores & seat.cores) for other in neighbours))
    return max(1, share if quota is None else min(share, quota // max(1, len(neighbours))))


def default_threads(ranks: RankInfo) -> int:
    """This rank's share of the node's cores; to a process alone, what OMP_NUM_THREADS says. Collective.

    Launchers set that to 1 unasked, so from them it is nobody's wish.
    """
    if ranks.launcher == "alone" and os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads()
    seat = own_seat()
    _, everyone = Agreement().all(lambda: seat, lambda own: own)
    return share_of_cores(seat, everyone, slurm_cores() if ranks.launcher == "srun" else None, core_quota())


def checked_threads(wanted: int | None) -> int | None:
    """The config's, where this machine can start so many: OpenMP dies of too many in its own code, without a word of ours."""
    cores = len(own_cores())
    most = max(128, 8 * cores)
    if wanted is not None and wanted > most:
        raise UsageError(f"run.threads is {wanted} and this process may use {cores} cores: take at most {most}, or leave it out")
    return wanted


@contextmanager
def process_group(config: Config, ranks: RankInfo) -> Iterator[Watch]:
    """Ranks met (nothing for a process alone) and watched; threads set. Raises UsageError where a rank has no device, or another kind."""
    wanted = checked_threads(config.run.threads)
    limit = config.run.collective_timeout
    if ranks.size == 1:
        choose_device(config, ranks)
        torch.set_num_threads(wanted or default_threads(ranks))
        yield Watch(ranks, None, limit)
        return
    device, problem = None, interface_mistake(os.environ, own_addresses().values()) or ""
    try:
        device = choose_device(config, ranks)
    except UsageError as error:
        problem = str(error)  # told to all: the first rank alone speaks to the screen
    on_cuda = device is not None and device.type == "cuda"
    backend = "nccl" if on_cuda else "gloo"
    if on_cuda and config.parallel.offload:
        backend = "cpu:gloo,cuda:nccl"  # what lies on the host is summed there
    # The watch speaks first, since it knows more; the library's own time-out is for what happens before the watch looks.
    try:
        store = open_store(ranks, limit)
    except dist.DistNetworkError as error:
        if ranks.rank == 0:
            raise
        raise PeerLostError(
            f"rank 0 does not answer at {ranks.address}:{ranks.port} within {limit:.0f} s (run.collective_timeout): it never started, has "
            f"ended, or cannot be reached from {node_name()}; run the same command again"
        ) from error
    roll_call(store, ranks, "cpu" if device is None else device.type, problem, limit + WATCH_FIRST)
    if on_cuda:
        check_own_device(store, ranks, str(torch.cuda.get_device_properties(device).uuid))
    join(store, ranks, backend, limit + WATCH_FIRST)
    try:
        watch = Watch(ranks, store, limit)
        share = default_threads(ranks)  # asked of all, since a node may have run.threads of its own
        torch.set_num_threads(wanted or share)
        yield watch
    finally:
        dist.destroy_process_group()


def leave_together() -> None:
    """Waits for all ranks: launchers that kill what is left when one rank ends must not find anybody still writing."""
    if dist.is_initialized():
        with suppress(RuntimeError):  # a peer that dies now takes nothing with it: the run's state is whole
            dist.barrier()


def agreed(action: Callable[[], T]) -> T:
    """Runs `action` on every rank; an error of one rank is raised on all, so that none waits for another for ever."""
    result, error = None, None
    try:
        result = action()
    except MegascaleError as caught:
        error = caught
    if dist.is_initialized():
        everyone: list[tuple[type[MegascaleError], str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, None if error is None else (type(error), str(error)))
        failed = [(rank, e) for rank, e in enumerate(everyone) if e is not None]
        if failed:
            rank, (kind, text) = failed[0]
            raise kind(text if len(failed) == len(everyone) else f"rank {rank}: {text}") from None
    elif error is not None:
        raise error
    return result  # type: ignore[return-value]
