"""A process group of any size in a single process: nothing is sent, every call is noted.

torch's own `fake` backend moves nothing either, but keeps no log, frees what a collective reads before anyone has waited for it, and its
work has no future, which DDP asks for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.trace.lines import line_here

NAME = "traced"


@dataclass(frozen=True)
class Call:
    """One collective or message. `size`: bytes of the whole tensor; `sent`: those that leave this rank; `device`: where it lies; `line`:
    who asked; `start` and `end`: model time in seconds.
    """

    operation: str
    group: TracedGroup
    size: int
    sent: int
    device: str
    line: str
    start: float
    end: float


class Calls:
    """The log of a process. `takes`: the device types that the groups' real backend takes. `timed`: gives (start, end) of an exchange among
    ranks that a group can start at a time at the earliest, and makes the current stream wait for an end.
    """

    def __init__(self, takes: frozenset[str], timed: Timed | None = None) -> None:
        self.takes, self.timed = takes, timed
        self.log: list[Call] = []

    @property
    def wrong(self) -> list[Call]:
        """Calls with a tensor on a device that the backend does not take."""
        return [call for call in self.log if call.device not in self.takes]


@dataclass(frozen=True)
class Timed:
    exchange: Callable[[str, Sequence[int], int, float], tuple[float, float]]
    wait: Callable[[float], None]


CALLS = Calls(frozenset(("cpu",)))


class TracedWork(dist._Work):
    """Done at its `end` in model time. Like those of gloo and NCCL it keeps its tensors until somebody waits for it."""

    def __init__(self, end: float, tensors: Sequence[Tensor], calls: Calls) -> None:
        super().__init__()
        self.end, self.calls = end, calls
        self.tensors: tuple[Tensor, ...] = tuple(tensors)
        self.results = [weakref.ref(x) for x in tensors]

    def wait(self, timeout: Any = None) -> bool:
        if self.calls.timed is not None:
            self.calls.timed.wait(self.end)
        self.tensors = ()
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> Any:
        future: Any = torch.futures.Future()
        future.set_result([x() for x in self.results])
        self.wait()
        return future


Base: Any = dist.ProcessGroup  # its methods have several forms each, of which torch calls one


class TracedGroup(Base):  # type: ignore[misc]
    """`ranks`: its ranks in the world. `free`: the model time at which its last exchange is done, since a communicator has one queue."""

    def __init__(self, rank: int, size: int, ranks: list[int]) -> None:
        super().__init__(rank, size)
        self.place, self.count, self.ranks = rank, size, ranks
        self.free = 0.0

    def size(self) -> int:
        return self.count

    def rank(self) -> int:
        return self.place

    def getBackendName(self) -> str:  # torch asks by this name
        return NAME

    @property
    def pg_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:
        return self.pg_name

    def _note(self, operation: str, tensors: Sequence[Tensor], size: int, sent: int, ranks: Sequence[int] | None = None) -> TracedWork:
        start = end = 0.0
        if CALLS.timed is not None:
            start, end = CALLS.timed.exchange(operation, self.ranks if ranks is None else ranks, size, self.free)
            self.free = end
        CALLS.log.append(Call(operation, self, size, sent, tensors[0].device.type, line_here(), start, end))
        return TracedWork(end, tensors, CALLS)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> TracedWork:
        size = sum(x.nbytes for x in tensors)
        return self._note("all_reduce", tensors, size, 2 * size * (self.count - 1) // self.count)

    allreduce_coalesced = allreduce

    def all_gather_single(self, out: Tensor, x: Tensor, opts: Any = None) -> TracedWork:
        return self._note("all_gather", (x, out), out.nbytes, x.nbytes * (self.count - 1))

    _allgather_base = all_gather_single

    def reduce_scatter_single(self, out: Tensor, x: Tensor, opts: Any = None) -> TracedWork:
        return self._note("reduce_scatter", (x, out), x.nbytes, out.nbytes * (self.count - 1))

    _reduce_scatter_base = reduce_scatter_single

    def allgather(self, outs: list[list[Tensor]], tensors: list[Tensor], opts: Any = None) -> TracedWork:
        size = tensors[0].nbytes
        return self._note("all_gather", (*tensors, *outs[0]), size * self.count, size * (self.count - 1))

    def all_to_all_single(self, out: Tensor, x: Tensor, received: list[int], given: list[int], opts: Any = None) -> TracedWork:
        row = x[:1].nbytes if x.shape[0] else 0
        mine = row * given[self.place] if given else x.nbytes // self.count
        return self._note("all_to_all", (x, out), x.nbytes, x.nbytes - mine)

    alltoall_base = all_to_all_single

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> TracedWork:
        return self._note("broadcast", tensors, tensors[0].nbytes, tensors[0].nbytes)

    def barrier(self, opts: Any = None) -> TracedWork:
        return TracedWork(0.0, (), CALLS)

    def send(self, tensors: list[Tensor], to: int, tag: int = 0) -> TracedWork:
        return self._note("send", tensors, tensors[0].nbytes, tensors[0].nbytes, (self.ranks[self.place], self.ranks[to]))

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> TracedWork:
        return self._note("recv", tensors, tensors[0].nbytes, 0, (self.ranks[self.place], self.ranks[source]))


def start(rank: int, size: int, calls: Calls) -> None:
    """Makes this process rank `rank` of `size`. A process does it once at a time; `dist.destroy_process_group` ends it."""
    global CALLS
    CALLS = calls
    if not hasattr(dist.Backend, NAME.upper()):
        devices = ["cpu", *({torch._C._get_privateuse1_backend_name()} - {"privateuseone"})]
        dist.Backend.register_backend(NAME, _made, extended_api=True, devices=devices)
    dist.init_process_group(NAME, store=dist.HashStore(), rank=rank, world_size=size)


def _made(common: Any, options: Any) -> TracedGroup:
    ranks = list(common.global_ranks_in_group) or list(range(common.group_size))
    return TracedGroup(common.group_rank, common.group_size, ranks)
