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


def calls(sizes: dict[str, int], ulysses: int) -> tuple[int, dict[str, tuple[int, int]]]:
    """How often a rank makes groups, and size and rank of each axis."""
    from torch.distributed import device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=37, world_size=RANKS)
    made, make = [0], device_mesh.new_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        made[0] += 1
        return make(*args, **kwargs)

    device_mesh.new_group = counted
    mesh = build_mesh({**SIZES, **sizes}, "cpu", ulysses)
    assert all((axis.group is not None) == (axis.size > 1) for axis in mesh.axes.values())
    return made[0], {name: (axis.size, axis.rank) for name, axis in mesh.axes.items() if axis.size > 1}


@pytest.mark.parametrize(
    ("sizes", "ulysses", "most"),
    [
        ({"dp_shard": 64, "tp": 8}, 1, 64 + 8),  # it was 1,608
        ({"dp_shard": 8, "cp": 8, "tp": 8}, 2, 1000),  # 3,408
        ({"pp": 8, "dp_shard": 64, "ep": 8, "edp": 8}, 1, 64 + 8 + 3 * 64),  # 2,824
    ],
)
def test_axes_of_one_rank_make_no_groups(sizes: dict[str, int], ulysses: int, most: int) -> None:
    """Catches a group for every rank alone, which all ranks make together at the start, each a communicator with buffers of its own."""
    made, axes = run_ranks(1, calls, sizes, ulysses)[0]
    assert made <= most
    assert {n: axes[n][0] for n in sizes} == sizes
    assert axes["dp_shard"][1] == 37 // (sizes.get("tp", 1) * sizes.get("cp", 1)) % sizes["dp_shard"]


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
