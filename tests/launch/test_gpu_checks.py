"""What a GPU must be and have before a run allocates anything there, told from stubs of torch.cuda."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from megascale.errors import UsageError
from megascale.launch.ranks import RankInfo
from megascale.train import gpu
from megascale.train.device import choose_device
from megascale.train.estimate.memory import largest_rank, resident_bytes
from megascale.train.setup import checked_device
from tests.config.test_config import config

HOPPER = ("sm_80", "sm_90")
TWO = RankInfo(1, 2, 1, 2, "10.0.0.1", 2000, "srun")


@pytest.mark.parametrize(
    ("arch", "capability", "fits"),
    [
        ("sm_86", (8, 9), True),
        ("sm_90", (8, 9), False),
        ("sm_80", (9, 0), False),
        ("compute_80", (9, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (10, 0), False),
        ("sm_100", (10, 3), True),
    ],
)
def test_kernels_and_cards(arch: str, capability: tuple[int, int], fits: bool) -> None:
    """Catches binaries that are thought to run on another generation: "no kernel image is available" in the first product."""
    assert gpu.runs(arch, capability) is fits


@pytest.mark.parametrize(
    ("name", "capability", "settings", "built", "said"),
    [
        ("NVIDIA H100", (9, 0), (), HOPPER, None),
        ("NVIDIA H100", (9, 0), ("precision.compute=bf16",), HOPPER, None),
        ("NVIDIA P100", (6, 0), (), HOPPER, r"NVIDIA P100 has compute capability 6\.0, and torch .* only has kernels for sm_80, sm_90:"),
        ("NVIDIA V100", (7, 0), ("precision.compute=bf16",), ("sm_70",), r"precision\.compute is bf16 .* 7\.0: bf16 products need 8\.0"),
        ("NVIDIA A100 MIG 1g.5gb", (8, 0), (), HOPPER, "rank 1 on .* a slice of a GPU, and there are 2 ranks: NCCL"),
    ],
)
def test_cards(name: str, capability: tuple[int, int], settings: tuple[str, ...], built: tuple[str, ...], said: str | None) -> None:
    """Catches a card that ends the run with a traceback of CUDA or NCCL instead of a sentence with the fix."""
    ask = config(*settings)
    if said is None:
        gpu.check_card(ask, TWO, name, capability, built)
    else:
        with pytest.raises(UsageError, match=said):
            gpu.check_card(ask, TWO, name, capability, built)


def test_the_device_is_set_before_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a card that is not looked at when a rank takes it, and a rank that goes to NCCL with GPU 0."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA K80")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (3, 7))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(HOPPER))
    with pytest.raises(UsageError, match=r"NVIDIA K80 has compute capability 3\.7"):
        choose_device(config(), TWO)
    assert chosen == [torch.device("cuda", 1)]


def test_scores_are_never_built_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches attention that falls back to the square of the sequence on a GPU, and fp64, which has no other way, without any."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(HOPPER))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace())
    allowed: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_math_sdp", allowed.append)
    for compute in ("bf16", "fp64", "fp32"):
        choose_device(config(f"precision.compute={compute}"), TWO)
    assert allowed == [False, True, False]


@pytest.mark.parametrize(
    ("built", "driver", "said"),
    [
        (None, 0, "is built for CPUs; install its CUDA build"),
        ("13.0", 12040, "its driver takes CUDA up to 12.4 and torch .* is built for 13.0; update the driver"),
        ("13.0", 13000, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_no_gpu(built: str | None, driver: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a driver that is too old and is told as a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    with pytest.raises(UsageError, match=rf"run\.device is cuda but torch finds no CUDA device here: .*{said}"):
        choose_device(config("run.device=cuda"), RankInfo())


def test_a_gpu_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback of CUDA where a GPU is so full that it has no room for a context, or in exclusive mode."""

    def full(_: torch.device) -> None:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", full)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="1"))
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout="4711, python, 79000 MiB\n"))  # type: ignore[attr-defined]
    with pytest.raises(
        UsageError, match=r"rank 1 on .* cannot use cuda:1 \(CUDA error: out of memory\): it is held by process 4711, python, .*; end them"
    ):
        choose_device(config(), TWO)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout=""))  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"held by processes that are not visible from here"):
        choose_device(config(), TWO)


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a GPU that somebody else fills and that is found out of memory in the first step, without his name; on a node of many ranks
    after minutes of loading.
    """
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="1"))
    told = types.SimpleNamespace(stdout="4711, python, 77000 MiB\n")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: told)  # type: ignore[attr-defined]
    device = torch.device("cuda", 1)
    gpu.check_room(config(), TWO, device, lambda: 10**9)
    with pytest.raises(
        UsageError, match=r"rank 1 on .* needs 3\.00 GB on cuda:1 .* 2\.00 GB are free: 78\.0 GB .* process 4711, .*; end them"
    ):
        gpu.check_room(config(), TWO, device, lambda: 3 * 10**9)
    with pytest.raises(UsageError, match=r"needs 90\.0 GB .*; shard the state over more ranks"):
        gpu.check_room(config(), TWO, device, lambda: 90 * 10**9)
    gpu.check_room(config(), TWO, torch.device("cpu"), lambda: 10**15)
    held = largest_rank(config(), dict.fromkeys(("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "edp"), 1))
    assert resident_bytes(config(), 1) == held["parameters"] + held["optimizer"]
    asked: list[Any] = []
    monkeypatch.setattr("megascale.train.setup.check_room", lambda *args: asked.append(args[2]))
    assert checked_device(config("run.device=cpu"), RankInfo()) == torch.device("cpu") and asked == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("compute", "cudnn", "compiled", "said"),
    [
        ("fp32", 92000, True, "without tensor cores"),
        ("bf16", 91002, True, "FlashAttention-2, since cuDNN is 91002"),
        ("bf16", 91501, False, "parallel.compile is false on NVIDIA H100"),
        ("bf16", 91501, True, None),
    ],
)
def test_what_is_slow_is_said(compute: str, cudnn: int, compiled: bool, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a config written for a CPU that trains ten times too slowly on a GPU without a word, an old cuDNN, and an eager run."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    facts = {"device": "NVIDIA H100", **gpu.gpu_facts(torch.device("cuda"))}
    notes = gpu.slow_notes(config(f"precision.compute={compute}", f"parallel.compile={str(compiled).lower()}"), facts)
    assert (notes == []) if said is None else said in notes[0]
    assert gpu.slow_notes(config(), {"device": "cpu", **gpu.gpu_facts(torch.device("cpu"))}) == []
    if compute == "fp32":
        assert "one after the other" in gpu.slow_notes(config("model.moe={}"), facts)[1]
