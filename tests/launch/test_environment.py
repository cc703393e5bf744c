"""What a job on GPUs sets for torch, and its time-outs."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megascale.launch.environment import gpu_defaults, prepare
from megascale.train import process_group
from megascale.train.faults.watchdog import keep_flight
from tests.config.test_config import config


def test_what_is_set() -> None:
    """Catches fragments of memory on GPUs, a hang in NCCL of which nothing is left, and a user's own setting that is replaced."""
    env = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "TORCH_FR_BUFFER_SIZE": "7", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/x"}
    assert gpu_defaults(Path("runs/a"), env) == {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    mine: dict[str, str] = {}
    prepare(Path("runs/a"), mine)
    assert mine == {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_FR_BUFFER_SIZE": "20000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": "runs/a/flight/rank-",
    }


def test_the_recorder_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a verdict without NCCL's last collectives, and one that dies where torch has no recorder."""
    keep_flight(tmp_path / "flight" / "rank-00001.json")
    assert not (tmp_path / "flight").exists()
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", lambda: b"{}", raising=False)
    keep_flight(tmp_path / "flight" / "rank-00001.json")
    assert (tmp_path / "flight" / "rank-00001.json").read_bytes() == b"{}"


@pytest.mark.parametrize(("start", "told"), [("", []), ("run.start_timeout=1800", [(630.0, None), (630.0, "group")])])
def test_two_time_outs(start: str, told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a library that waits as long in every step as for the first kernels to compile, or gives up while they do."""
    found: list[Any] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(process_group, "set_patience", lambda limit, group: found.append((limit / timedelta(seconds=1), group)))
    given: Any = ["group", None, "group"]
    process_group.end_start(config(*([start] if start else [])), given)
    assert found == told
    assert process_group.start_key(config(*([start] if start else []))) == f"run.{'start' if start else 'collective'}_timeout"
