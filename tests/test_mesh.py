"""The groups of a mesh, on one process as a rank of many."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megascale.comm import group
from megascale.comm.mesh import build_mesh
from megascale.config.layout import axis_sizes
from megascale.config.schema import Parallel
from megascale.launch.ranks import RankInfo
from tests.ranks import run_ranks

SIZES = {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "ep": 1, "edp": 1}
RANKS = 512


def calls(sizes: dict[str, int], ulysses: int) -> tuple[int, int, dict[str, tuple[int, int]], list[set[str]]]:
    """How often a rank makes groups and in how many it is, size and rank of each axis, and the axes that share a group."""
    from torch.distributed import distributed_c10d
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=37, world_size=RANKS)
    made, make = [0], dist.new_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        made[0] += 1
        return make(*args, **kwargs)

    dist.new_group = counted
    mesh = build_mesh({**SIZES, **sizes}, "cpu", ulysses)
    assert all((axis.group is not None) == (axis.size > 1) for axis in mesh.axes.values())
    for name, axis in mesh.axes.items():
        assert axis.group is None or dist.get_process_group_ranks(axis.group).index(37) == axis.rank, name
    shared = [{n for n, a in mesh.axes.items() if a.group is group} for group in {a.group for a in mesh.axes.values()} if group is not None]
    mine = len(distributed_c10d._world.pg_map) - 1
    return made[0], mine, {name: (axis.size, axis.rank) for name, axis in mesh.axes.items() if axis.size > 1}, shared


@pytest.mark.parametrize(
    ("sizes", "ulysses", "made", "mine", "shared"),
    [
        ({"dp_shard": 64, "tp": 8}, 1, 64 + 8, 2, {"dp_shard", "shard"}),  # it was 1,608 calls
        # cp, its two dimensions, tp, dp_shard, and shard that DDP's replicas are too; it was 3,408 calls, then 848, and 11 groups a rank.
        ({"dp_shard": 8, "cp": 8, "tp": 8}, 2, 584, 6, {"shard", "replicas"}),
        ({"pp": 8, "dp_shard": 64, "ep": 8, "edp": 8}, 1, 64 + 8 + 2 * 64, 4, {"dp_shard", "shard"}),  # 2,824; 264, 5
        # Whole experts over tp; rows for experts do not wait for gathered weights.
        ({"dp_shard": 64, "tp": 8, "ep": 8, "edp": 64}, 1, 136, 3, {"dp_shard", "shard", "edp"}),  # 144, 4
        ({"cp": 8, "dp_shard": 8, "tp": 8, "ep": 8, "edp": 8}, 1, 264, 5, {"dp_shard", "edp"}),  # 720, 13
        ({"dp_replicate": 8, "dp_shard": 8, "tp": 8, "ep": 8}, 1, 257, 5, {"dp_shard", "shard"}),  # 896, 7
        ({"dp_replicate": 512}, 1, 2, 2, {"dp_replicate", "replicas"}),  # FSDP2's own axis of one rank; 512, 1
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # the same in every process
)
def test_no_group_is_made_twice(sizes: dict[str, int], ulysses: int, made: int, mine: int, shared: set[str]) -> None:
    """Catches a group for every rank alone, which all ranks make together at the start, and a second one for the same ranks, each a
    communicator with buffers of its own; but also rows for experts that share one with weights, and wait for them.
    """
    calls_made, groups, axes, together = run_ranks(1, calls, sizes, ulysses)[0]
    assert (calls_made, groups) == (made, mine)
    assert shared in together and not any("ep" in names and len(names) > 1 for names in together)
    assert {n: axes[n][0] for n in sizes} == sizes
    tp, cp = sizes.get("tp", 1), sizes.get("cp", 1)
    assert axes.get("dp_shard", (1, 0))[1] == 37 // (tp * cp) % sizes.get("dp_shard", 1)


@pytest.mark.parametrize(("backend", "bound"), [("nccl", True), ("cpu:gloo,cuda:nccl", False), ("gloo", False)])
def test_nccl_is_told_its_device(backend: str, bound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks of a node that all connect on GPU 0, and host tensors of a second backend that a split group has no way for."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: told.update(kwargs))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    group.join(dist.HashStore(), RankInfo(1, 2, 1, 2, "127.0.0.1", 2000, "srun"), backend, 5.0, torch.device("cuda", 1))
    assert told["device_id"] == (torch.device("cuda", 1) if bound else None) and told["timeout"] == timedelta(seconds=5)


def own_group() -> bool:
    return build_mesh(axis_sizes(Parallel(tp=2), 2), "cpu")["tp"].group is not dist.group.WORLD


@pytest.mark.dist
def test_an_axis_over_all_ranks_has_its_own_group() -> None:
    """Catches an axis with the default group: that is destroyed while the mesh may still hold it, and gloo aborts the process at exit."""
    assert run_ranks(2, own_group) == [True, True]
