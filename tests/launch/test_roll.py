"""The roll call: who has come, and who cannot train with the others. Ranks are threads with a store each: nothing needs a process."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megascale.comm import roll
from megascale.comm.roll import Word, disagreement, roll_call
from megascale.config.load import build_config
from megascale.errors import MegascaleError, PeerLostError, UsageError
from megascale.launch.ranks import RankInfo
from megascale.train import process_group
from megascale.train.log.announce import unused_gpu_note
from tests.config.test_config import BASE

GPU, CPU = Word("n1", "cuda"), Word("n2", "cpu")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([GPU, GPU], None),
        ([CPU, CPU], None),
        ([GPU, GPU, CPU], "no CUDA device for rank 2 on n2, but rank 0 on n1 has one"),
        ([CPU, CPU, GPU], "no CUDA device for rank 0 on n2, but rank 2 on n1 has one"),
        ([GPU, Word("n2", "cpu", "run.device is cuda and torch finds none")], "rank 1 on n2: run.device is cuda"),
    ],
)
def test_who_can_train_together(words: list[Word], expected: str | None) -> None:
    """Catches ranks with different communication libraries, which is a time-out, and the wrong node called bare."""
    found = disagreement(words)
    assert found is None if expected is None else found is not None and expected in found


def calls(devices: list[tuple[str, str]], size: int, patience: float = 20.0) -> list[MegascaleError | None]:
    """What each rank that comes ends with."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    ends: list[MegascaleError | None] = [None] * len(devices)

    def one(rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", server.port, None, False, timedelta(seconds=20), wait_for_workers=False)
        try:
            roll_call(dist.PrefixStore("attempt-0", store), RankInfo(rank, size, rank, size), *devices[rank], patience)
        except MegascaleError as error:
            ends[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(devices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return ends


def test_ranks_hear_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank without a device that ends unheard, since the first one alone speaks, and a rank that never came without a number."""
    monkeypatch.setattr(roll, "READING", 0.0)
    assert calls([("cpu", "")] * 3, 3) == [None] * 3
    refused = calls([("cuda", ""), ("cpu", "no device here")], 2)
    assert all(type(e) is UsageError and "rank 1 on" in str(e) and "no device here" in str(e) for e in refused)
    lost = calls([("cpu", "")] * 2, 4, 0.2)
    assert all(type(e) is PeerLostError and "2 of 4 ranks have not come" in str(e) and "(rank 2, 3)" in str(e) for e in lost)


def test_a_first_rank_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches "a peer is gone" with a library's words where it is known which peer was waited for, and where."""

    def nobody(*args: Any) -> None:
        raise dist.DistNetworkError("The client socket has timed out after 10000ms while trying to connect to (10.0.0.1, 2000).")

    monkeypatch.setattr(process_group, "open_store", nobody)
    met = process_group.process_group(build_config(BASE), RankInfo(1, 2, 0, 1, "10.0.0.1", 2000, "srun"))
    with pytest.raises(PeerLostError, match=r"rank 0 does not answer at 10\.0\.0\.1:2000 within 600 s"), met:
        pass


def test_a_device_that_is_missing_is_told_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank whose driver does not work that leaves before it has met the others, who wait for it."""
    told: list[Any] = []

    def called(store: Any, ranks: RankInfo, *words: Any) -> None:
        told.extend(words)
        raise UsageError("enough")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(process_group, "open_store", lambda *a: None)
    monkeypatch.setattr(process_group, "roll_call", called)
    config = build_config({**BASE, "run": {"device": "cuda", "threads": torch.get_num_threads()}})
    with pytest.raises(UsageError, match="enough"), process_group.process_group(config, RankInfo(1, 2, 0, 1, "10.0.0.1", 2000, "srun")):
        pass
    assert told[0] == "cpu" and "torch finds no CUDA device" in told[1]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    with (
        pytest.raises(UsageError, match="enough"),
        process_group.process_group(build_config(BASE), RankInfo(1, 2, 0, 1, "10.0.0.1", 2000, "srun")),
    ):
        pass
    assert "'no-such-interface', and the interfaces that have an address here are" in told[4]


@pytest.mark.parametrize(
    ("wanted", "env", "present", "warned"),
    [
        ("auto", {}, True, True),
        ("auto", {"CUDA_VISIBLE_DEVICES": "0,1"}, False, True),
        ("auto", {}, False, False),
        ("auto", {"CUDA_VISIBLE_DEVICES": ""}, True, False),
        ("auto", {"CUDA_VISIBLE_DEVICES": "-1"}, True, False),
        ("auto", {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, True, False),
        ("cpu", {"CUDA_VISIBLE_DEVICES": "0"}, True, False),
    ],
)
def test_a_gpu_that_is_not_used(wanted: str, env: dict[str, str], present: bool, warned: bool) -> None:
    """Catches a machine with a GPU that trains on CPUs without a word, and a word to those who meant CPUs."""
    config = build_config({**BASE, "run": {"device": wanted}})
    assert (unused_gpu_note(config, "cpu", env, present) is not None) == warned
    assert unused_gpu_note(config, "NVIDIA H100", env, present) is None
