"""The choice of a rank's device, tested without devices: visible ones are given as numbers, chosen ones as UUIDs."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megascale.comm.group import check_own_device
from megascale.errors import UsageError
from megascale.launch.devices import device_index, shared_device
from megascale.launch.ranks import RankInfo
from megascale.limits import own_cores
from megascale.train.device import checked_threads, choose_device
from tests.config.test_config import config


def ranks_of_a_node(size: int, nodes: int = 1) -> list[RankInfo]:
    return [RankInfo(rank, size * nodes, rank % size, size, "10.0.0.1", 2000, "srun") for rank in range(size * nodes)]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (4, [0, 1, 2, 3]),  # all ranks see all devices
        (8, [0, 1, 2, 3]),
        (1, [0, 0, 0, 0]),  # --gpus-per-task=1, --gpu-bind=single: one each, and each is number 0
        (2, [0, 1, 0, 1]),  # --gpus-per-task=2
    ],
)
def test_the_number_follows_what_is_seen(visible: int, expected: list[int]) -> None:
    """Catches a rank that asks for device 3 where it sees one, and neighbours that take the same of several."""
    assert [device_index(ranks, visible) for ranks in ranks_of_a_node(4)] == expected


def test_two_ranks_on_one_device() -> None:
    """Catches a device that two ranks share unseen, and devices of different nodes or tasks that are taken for one."""
    assert shared_device([("a", "GPU-0"), ("a", "GPU-1"), ("b", "GPU-2"), ("b", "GPU-3")]) is None
    said = shared_device([("a", "GPU-0"), ("a", "GPU-1"), ("b", "GPU-2"), ("b", "GPU-2")])
    assert said is not None and said.startswith("ranks 2 and 3 on b share the device GPU-2") and "--gpus-per-task=1" in said


@pytest.mark.parametrize(("uuids", "refused"), [(("x", "y"), False), (("x", "x"), True)])
def test_all_ranks_learn_of_it(uuids: tuple[str, str], refused: bool) -> None:
    """Catches a mistake that one rank knows while the others wait for it: rank 0 has to say it."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=10), wait_for_workers=False)
    stores = [server, dist.TCPStore("127.0.0.1", server.port, None, False, timedelta(seconds=10), wait_for_workers=False)]
    said: dict[int, str] = {}

    def rank(number: int) -> None:
        try:
            check_own_device(dist.PrefixStore("attempt-0", stores[number]), ranks_of_a_node(2)[number], uuids[number])
        except UsageError as error:
            said[number] = str(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(said) == ([0, 1] if refused else []) and len(set(said.values())) == int(refused)


def test_one_visible_device_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches "local rank 3 has no device of its own … start fewer ranks" where SLURM shows every task its own device alone."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace())
    monkeypatch.setattr(torch.backends.cuda, "enable_math_sdp", lambda _: None)
    assert choose_device(config(), ranks_of_a_node(4)[3]) == torch.device("cuda", 0) and chosen == [torch.device("cuda", 0)]


def test_cores_of_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches threads for all cores of a machine of which the job has a few, and so many that OpenMP ends the process with SIGSEGV."""
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 7}, raising=False)
    assert own_cores() == {3, 7}
    assert (checked_threads(None), checked_threads(128)) == (None, 128)
    with pytest.raises(UsageError, match=r"run\.threads is 129 but this process may use 2 cores: take at most 128"):
        checked_threads(129)
