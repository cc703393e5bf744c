"""The ranks as a grid with named axes. One object owns the groups; everything that communicates is handed the axis it uses."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megascale.config.axes import AXES, EXPERT_AXES, NAMES, data_part, data_parts

# What dimensions send: weights, gradients and sums of numbers by default. Each kind has communicators of its own, since messages of one
# communicator wait for each other, and rows for experts or blocks of a ring travel while weights are gathered.
KINDS = {"pp": "pp", "cp": "cp", "ulysses": "cp", "tp": "tp", "etp": "tp", "ep": "ep"}


@dataclass
class Traffic:
    """Bytes sent by this rank and collectives started, by axis, since the last `take`.

    Each is counted before it is sent, so that `last` names the collective in which a rank hangs. `moved` never decreases. `gate`: called
    before every micro-batch, where all ranks may stop (train/faults/gate.py). `mark`, on a device that lags behind the host: records an
    event after everything queued so far. `started`: called when rows for experts are on their way, and another pass may go on (turns.py).
    """

    sent: Counter[str] = field(default_factory=Counter)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    moved: int = 0
    last: str = ""
    gate: Callable[[], None] | None = None
    mark: Callable[[], Any] | None = None
    started: Callable[[], None] | None = None
    _given: deque[tuple[int, str, Any]] = field(default_factory=deque)  # collectives that the device had not reached at the last check
    _reached: tuple[int, str] = (0, "")

    def micro_batch(self) -> None:
        """Marks the beginning of a micro-batch, or of a step that cannot be interrupted. Raises what the gate raises."""
        if self.gate is not None:
            self.gate()
        self.moved += 1

    def add(self, axis: str, operation: str, sent: int) -> None:
        self.moved += 1
        self.last = f"{operation} over {axis}"
        if self.mark is not None:
            self._given.append((self.moved, self.last, self.mark()))
        self.sent[axis] += sent
        self.calls[axis, operation] += 1

    def reached(self) -> tuple[int, str]:
        """`moved` and `last` as far as the device has come; the host has queued the whole step when one hangs. Called by the watchdog."""
        while self._given and self._given[0][2].query():
            self._reached = self._given.popleft()[:2]
        return self._reached if self._given else (self.moved, self.last)

    def take(self) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
        """Sent bytes and calls so far; resets the counts."""
        result = dict(self.sent), dict(self.calls)
        self.sent.clear()
        self.calls.clear()
        return result


@dataclass(frozen=True)
class Axis:
    """One dimension of the grid as this rank sees it. `group` is None at size one."""

    name: str
    size: int
    rank: int
    group: dist.ProcessGroup | None
    traffic: Traffic


@dataclass(frozen=True)
class Mesh:
    """All axes, and torch's DeviceMesh over the axes that weights are placed on (None for one process).

    Besides the axes of AXES there are other views of the same ranks. `shard`: dp_shard and cp together, over which FSDP2 shards weights,
    since ranks with other tokens of the same samples need the same weights. `replicas`: all ranks between which DDP sums. `cp_ring` and
    `cp_ulysses`: the two dimensions of cp. Each counts its bytes under the name of the axis it is made of.
    """

    axes: dict[str, Axis]
    device_mesh: DeviceMesh | None
    expert_mesh: DeviceMesh | None  # over dp_replicate, edp and ep, if experts have their own axes
    traffic: Traffic
    rank: int
    size: int

    def __getitem__(self, name: str) -> Axis:
        return self.axes[name]

    @property
    def data_size(self) -> int:
        """The number of different parts that a global batch is split into."""
        return data_parts({name: axis.size for name, axis in self.axes.items()})

    @property
    def data_rank(self) -> int:
        """The number of this rank's part."""
        sizes, place = ({n: getattr(a, what) for n, a in self.axes.items()} for what in ("size", "rank"))
        return data_part(sizes, place)

    @property
    def tells_loss(self) -> bool:
        """Whether this rank contributes its loss: one of the ranks with the same loss does, so that a sum over all ranks has each loss
        once.
        """
        return all(self[a.name].rank == 0 for a in AXES if a.whole_loss)

    @property
    def tells_batch(self) -> bool:
        """Whether this rank contributes the number of its samples: one of the ranks with the same samples does."""
        return all(self[a.name].rank == 0 for a in AXES if not a.other_data)


def coordinates(rank: int, sizes: dict[str, int]) -> dict[str, int]:
    """Global rank → its place on each axis, in the order of AXES with the last one fastest; then on EXPERT_AXES."""
    place = {}
    for name in reversed(NAMES):
        rank, place[name] = divmod(rank, sizes[name])
    place["edp"] = place["ep"] = 0
    if _own_axes(sizes):
        index = (place["dp_shard"] * sizes["cp"] + place["cp"]) * sizes["tp"] + place["tp"]
        place["edp"], place["ep"] = divmod(index // _expert_tp(sizes), sizes["ep"])
    return place


def build_mesh(sizes: dict[str, int], device_type: str, ulysses: int = 1) -> Mesh:
    """`sizes` of every axis of AXES, whose product is the number of ranks, and of EXPERT_AXES. Groups of `ulysses` neighbours on cp
    exchange heads, and a ring of such groups passes blocks around. Collective over all ranks.
    """
    groups = Groups(device_type, Traffic())
    pp, replicate, shard, cp, tp = (sizes[n] for n in NAMES)
    # FSDP2 shards over an axis of one rank if weights have replicas, or experts their own axis.
    kept = "dp_shard" if replicate > 1 or sizes.get("edp", 1) > 1 else ""
    whole = {n: sizes[n] for n in NAMES}
    axes = {n: groups.axis(whole, n) for n in NAMES}
    stored = {"pp": pp, "dp_replicate": replicate, "dp_shard": shard * cp, "tp": tp}
    copied = {"pp": pp, "dp_replicate": replicate * shard * cp, "tp": tp}
    split = {"before": pp * replicate * shard, "cp": cp // ulysses, "ulysses": ulysses, "tp": tp}
    seen = {
        "shard": groups.axis(stored, "dp_shard"),
        "replicas": groups.axis(copied if cp > 1 else whole, "dp_replicate"),
        "cp_ring": groups.axis(split, "cp"),
        "cp_ulysses": replace(groups.axis(split, "ulysses"), name="cp"),
    }
    grid = groups.grid(stored, kept if cp == 1 else "")
    experts = None
    seen |= {n: Axis(n, 1, 0, None, groups.traffic) for n in EXPERT_AXES}
    if _own_axes(sizes):
        view = {"pp": pp, "dp_replicate": replicate, "edp": sizes["edp"], "ep": sizes["ep"], "etp": _expert_tp(sizes)}
        experts = groups.grid(view, "edp" if replicate > 1 else "")
        seen |= {n: groups.axis(view, n) for n in EXPERT_AXES}
    started = dist.is_initialized()
    return Mesh({**axes, **seen}, grid, experts, groups.traffic, dist.get_rank() if started else 0, dist.get_world_size() if started else 1)


def _own_axes(sizes: dict[str, int]) -> bool:
    return sizes.get("edp", 1) * sizes.get("ep", 1) > 1


def _expert_tp(sizes: dict[str, int]) -> int:
    """Ranks over which a single expert is split: those of a replica, divided by edp·ep."""
    return sizes["dp_shard"] * sizes["cp"] * sizes["tp"] // (sizes["edp"] * sizes["ep"])


@dataclass
class Groups:
    """Process groups for dimensions of views. A view has all ranks, its last name is the fastest dimension.

    Dimensions of the same ranks share a group, if what they send would not overlap anyway (`KINDS`). Those of one rank have none.
    """

    device_type: str
    traffic: Traffic
    made: dict[tuple[int, int, str], dist.ProcessGroup] = field(default_factory=dict)

    def axis(self, view: dict[str, int], name: str) -> Axis:
        size, stride = _dimension(view, name)
        if size == 1 or not dist.is_initialized():
            return Axis(name, 1, 0, None, self.traffic)
        return Axis(name, size, dist.get_rank() // stride % size, self.group(view, name), self.traffic)

    def group(self, view: dict[str, int], name: str) -> dist.ProcessGroup:
        """The group of this rank along a dimension. Collective over all ranks."""
        size, stride = _dimension(view, name)
        key = size, stride, KINDS.get(name, "data")
        if key not in self.made:
            # Never the default group: that is destroyed while a mesh may still hold it, and then gloo aborts the process at exit.
            ranks = torch.arange(dist.get_world_size()).view(-1, size, stride).transpose(1, 2).reshape(-1, size).tolist()
            self.made[key] = _own_group(ranks, f"mesh_{name}")
        return self.made[key]

    def grid(self, view: dict[str, int], keep: str) -> DeviceMesh | None:
        """The dimensions of more than one rank, and `keep`, an axis that FSDP2 will ask for, as torch knows them."""
        if not dist.is_initialized():
            return None
        names = tuple(n for n, size in view.items() if size > 1 or n == keep) or tuple(view)[-1:]
        groups, shape = [self.group(view, n) for n in names], [view[n] for n in names]
        if len(names) == 1:
            return DeviceMesh.from_group(groups[0], self.device_type, mesh_dim_names=names)
        return DeviceMesh.from_group(groups, self.device_type, mesh=torch.arange(math.prod(shape)).view(shape), mesh_dim_names=names)


def _dimension(view: dict[str, int], name: str) -> tuple[int, int]:
    """Its size, and the distance between its neighbours' ranks: these two say which ranks belong together."""
    names = list(view)
    return view[name], math.prod(view[n] for n in names[names.index(name) + 1 :])


def _own_group(ranks: list[list[int]], what: str) -> dist.ProcessGroup:
    """The group of this rank among disjoint groups of all ranks."""
    me = dist.get_rank()
    if getattr(dist.group.WORLD, "bound_device_id", None) is not None and torch.accelerator.is_available():
        return dist.split_group(split_ranks=ranks, group_desc=what)  # type: ignore[return-value]
    if len(ranks[0]) == 1:
        return dist.new_group([me], use_local_synchronization=True, group_desc=what)  # the others need not take part
    return next(g for g in [dist.new_group(r, group_desc=what) for r in ranks] if g is not dist.GroupMember.NON_GROUP_MEMBER)
