"""The ranks as a grid with named axes. One object owns the groups; everything that communicates is handed the axis it uses."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megascale.config.axes import AXES, EXPERT_AXES, NAMES, data_part, data_parts


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
    traffic = Traffic()
    pp, replicate, shard, cp, tp = (sizes[n] for n in NAMES)
    # FSDP2 shards over an axis of one rank if weights have replicas, or experts their own axis.
    kept = "dp_shard" if replicate > 1 or sizes.get("edp", 1) > 1 else ""
    grid, axes = _view({n: sizes[n] for n in NAMES}, device_type, traffic, kept)
    seen = {"shard": axes["dp_shard"], "replicas": axes["dp_replicate"], "cp_ring": axes["cp"], "cp_ulysses": axes["cp"]}
    if cp > 1:
        grid, stored = _view({"pp": pp, "dp_replicate": replicate, "dp_shard": shard * cp, "tp": tp}, device_type, traffic)
        _, copied = _view({"pp": pp, "dp_replicate": replicate * shard * cp, "tp": tp}, device_type, traffic)
        _, split = _view({"before": pp * replicate * shard, "cp": cp // ulysses, "ulysses": ulysses, "tp": tp}, device_type, traffic)
        seen = {
            "shard": stored["dp_shard"],
            "replicas": copied["dp_replicate"],
            "cp_ring": split["cp"],
            "cp_ulysses": replace(split["ulysses"], name="cp"),
        }
    experts = None
    seen |= {n: Axis(n, 1, 0, None, traffic) for n in EXPERT_AXES}
    if _own_axes(sizes):
        view = {"pp": pp, "dp_replicate": replicate, "edp": sizes["edp"], "ep": sizes["ep"], "etp": _expert_tp(sizes)}
        experts, cut = _view(view, device_type, traffic, "edp" if replicate > 1 else "")
        seen |= {n: cut[n] for n in EXPERT_AXES}
    started = dist.is_initialized()
    return Mesh({**axes, **seen}, grid, experts, traffic, dist.get_rank() if started else 0, dist.get_world_size() if started else 1)


def _own_axes(sizes: dict[str, int]) -> bool:
    return sizes.get("edp", 1) * sizes.get("ep", 1) > 1


def _expert_tp(sizes: dict[str, int]) -> int:
    """Ranks over which a single expert is split: those of a replica, divided by edp·ep."""
    return sizes["dp_shard"] * sizes["cp"] * sizes["tp"] // (sizes["edp"] * sizes["ep"])


def _view(sizes: dict[str, int], device_type: str, traffic: Traffic, keep: str = "") -> tuple[DeviceMesh | None, dict[str, Axis]]:
    """All ranks as one grid, the last name fastest. Axes of one rank get no groups, since each rank would be a group that all ranks have to
    create; `keep` is the exception, an axis that FSDP2 will ask for.
    """
    alone = {n: Axis(n, 1, 0, None, traffic) for n in sizes}
    if not dist.is_initialized():
        return None, alone
    there = {n: k for n, k in sizes.items() if k > 1 or n == keep}
    names = tuple(there)
    if len(there) == 1:
        # DeviceMesh would take the default group. It is destroyed while a mesh may still hold it, and then gloo aborts the process at exit.
        grid = DeviceMesh.from_group(dist.new_group(), device_type, mesh_dim_names=names)
    else:
        grid = init_device_mesh(device_type, tuple(there.values()), mesh_dim_names=names)
    return grid, {n: Axis(n, k, grid.get_local_rank(n), grid.get_group(n), traffic) if k > 1 else alone[n] for n, k in sizes.items()}
