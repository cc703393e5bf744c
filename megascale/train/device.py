"""The device and the threads of a process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megascale.comm.agreement import Agreement
from megascale.config.schema import Config
from megascale.errors import UsageError
from megascale.launch.devices import device_index
from megascale.launch.numa import bind_near
from megascale.launch.ranks import RankInfo, node_name
from megascale.limits import core_quota, own_cores, slurm_cores
from megascale.train.gpu import check_card, take, why_no_gpu


def choose_device(config: Config, ranks: RankInfo) -> torch.device:
    wanted = config.run.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(f"run.device is cuda but torch finds no CUDA device here: {why_no_gpu()}")
    device = torch.device("cuda", device_index(ranks, torch.cuda.device_count()))
    take(ranks, device)
    check_card(config, ranks, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), torch.cuda.get_arch_list())
    if config.run.numa:
        bind_near(torch.cuda.get_device_properties(device))
    forbid_scores(config)
    return device


def forbid_scores(config: Config) -> None:
    """Forbids torch's attention that builds the matrix of scores, to which it turns silently where no fused kernel fits: memory and time of
    the square of the sequence. Only that one knows fp64.
    """
    torch.backends.cuda.enable_math_sdp(config.precision.compute == "fp64")


class Seat(NamedTuple):
    """A rank's node and the set of cores it may run on, as a bit mask."""

    node: str
    cores: int


def own_seat() -> Seat:
    return Seat(node_name(), sum(1 << core for core in own_cores()))


def share_of_cores(seat: Seat, everyone: Sequence[Seat], given: int | None, quota: int | None) -> int:
    """Threads of a rank at `seat`: its part of the cores that it shares with other ranks of its node, and all cores that only it may use.

    given  number of cores that the launcher assigned to it, bound or not
    quota  number of cores that all ranks of the node may keep busy together
    """
    neighbours = [other for other in everyone if other.node == seat.node]
    cores = seat.cores.bit_count()
    share = min(cores, given) if given else cores // max(1, sum(bool(other.cores & seat.cores) for other in neighbours))
    return max(1, share if quota is None else min(share, quota // max(1, len(neighbours))))


def default_threads(ranks: RankInfo) -> int:
    """This rank's share of the node's cores; a process alone respects OMP_NUM_THREADS. Collective.

    Launchers set that variable to 1 by default, so under a launcher it is ignored.
    """
    if ranks.launcher == "alone" and os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads()
    seat = own_seat()
    _, everyone = Agreement().all(lambda: seat, lambda own: own)
    return share_of_cores(seat, everyone, slurm_cores() if ranks.launcher == "srun" else None, core_quota())


def checked_threads(wanted: int | None) -> int | None:
    """The config's number, checked against this machine: OpenMP crashes without a message if it cannot start that many."""
    cores = len(own_cores())
    most = max(128, 8 * cores)
    if wanted is not None and wanted > most:
        raise UsageError(f"run.threads is {wanted} but this process may use {cores} cores: take at most {most}, or leave it out")
    return wanted
