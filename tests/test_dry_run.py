"""The dry run: a verdict first, in units that a person reads, and no more than what was asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megascale.commands.train import app
from megascale.config.load import build_config, read_yaml, to_yaml
from megascale.config.schema import Config
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.launch.ranks import RankInfo
from megascale.train.estimate import verdict
from megascale.train.estimate.dry_run import dry_run
from megascale.train.estimate.memory import needed
from megascale.train.estimate.oom_advice import ROOM
from megascale.train.phases import Phase, phases_of
from tests.runs import make_tokens, settings

GB = 1e9
LARGE: dict[str, Any] = {
    "model__vocab_size": 4096,
    "model__hidden_size": 1024,
    "model__num_layers": 8,
    "train__global_batch_size": 64,
    "train__micro_batch_size": 8,
    "train__seq_len": 512,
}


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def checked_phases(config: Config, ranks: int) -> list[Phase]:
    return phases_of(check(config, ranks), ranks)


def test_yes_no_and_what_would_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a verdict that is not the first line, that flatters, or whose advice does not fit when it is followed."""
    values = settings(tmp_path, **LARGE)
    dry_run(build_config(values), 2, str(tmp_path / "a.json"), device_bytes=80 * GB)
    first, *_ = told(capsys)
    assert re.fullmatch(r"fits: yes, [0-9.]+ [MG]B of 80.0 GB on each of 2 devices", first)
    found = json.loads((tmp_path / "a.json").read_text())
    need = sum(found["needed_bytes"].values())
    assert found["fits"] is True and found["device_bytes"] == 80 * GB
    assert found["needed_bytes"]["state"] == sum(found["bytes_per_rank"].values())
    dry_run(build_config(values), 2, str(tmp_path / "b.json"), device_bytes=need / 1.1)
    lines = told(capsys)
    assert lines[0].startswith("fits: no, ") and json.loads((tmp_path / "b.json").read_text())["fits"] is False
    advice = next(line for line in lines if "would fit: " in line).split("would fit: ")[1].split(", or ")
    assert advice[0].startswith("train.micro_batch_size=4 (")
    for change in advice:
        keys = {
            k.replace(".", "__"): int(v) if v.isdecimal() else v for k, _, v in (w.partition("=") for w in change.split(" (")[0].split())
        }
        dry_run(build_config(settings(tmp_path, **{**LARGE, **keys})), 2, None, device_bytes=need / 1.1)
        assert told(capsys)[0].startswith("fits: yes, ")
    # What the estimate leaves out needs room, too.
    dry_run(build_config(values), 2, None, device_bytes=need * 1.05)
    assert told(capsys)[0].startswith("fits: no, ")


def test_whose_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a verdict about a device that nobody knows, and CPU ranks that each count on the whole machine."""
    asked: list[RankInfo] = []

    def limit(device: torch.device, ranks: RankInfo) -> float:
        asked.append(ranks)
        return 64 * GB / ranks.local_size

    monkeypatch.setattr(verdict, "limit_of", limit)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    values = settings(tmp_path, **LARGE)
    values["run"]["device"] = "auto"
    dry_run(build_config(values), 4, str(tmp_path / "c.json"))
    lines = told(capsys)
    assert lines[0].startswith("fits: unknown, ") and "needed on each of 4 devices" in lines[0] and not asked
    assert any("--device-memory" in line for line in lines) and json.loads((tmp_path / "c.json").read_text())["fits"] is None
    dry_run(build_config(values), 1, None)
    assert told(capsys)[0].endswith(" of 64.0 GB of this machine's memory")
    dry_run(build_config(settings(tmp_path, **LARGE)), 4, None)
    assert told(capsys)[0].endswith(" of 16.0 GB for each of 4 ranks, if all of them ran on this machine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    dry_run(build_config(values), 4, None)
    assert told(capsys)[0].endswith(" of 64.0 GB on each of 4 devices like the first here (some GPU)")
    # On CPUs, what is offloaded stays in the same memory.
    kept, offloaded = (
        verdict.verdict(checked_phases(build_config({**values, "parallel": p}), 1), 1, verdict.Room(64 * GB, "", host=True))
        for p in ({}, {"offload": ["optimizer"], "accumulation": "layered"})
    )
    assert offloaded.state > kept.state


def test_a_run_that_grows_must_fit_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a verdict about the model that a run begins with alone."""
    values = settings(tmp_path, **LARGE)
    dry_run(build_config(values), 1, str(tmp_path / "d.json"), device_bytes=80 * GB)
    need = sum(json.loads((tmp_path / "d.json").read_text())["needed_bytes"].values())
    told(capsys)
    grown = [{"step": 3, "num_layers": 32}]
    dry_run(build_config({**values, "grow": grown}), 1, None, device_bytes=1.5 * need)
    lines = told(capsys)
    assert lines[0].endswith("on one device, from the change after step 3 on")
    assert lines[0].startswith("fits: no, ") and any("would fit" in line for line in lines)


def test_the_config_only_on_request(tmp_path: Path) -> None:
    """Catches a verdict that is scrolled away by keys nobody asked for, and options that mean nothing without --dry-run."""
    make_tokens(tmp_path / "tokens")
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(settings(tmp_path)))
    shown = CliRunner().invoke(app, [str(path), "--dry-run"])
    out = shown.stdout
    assert shown.exit_code == 0 and out.startswith("fits: ") and "global_batch_size" not in out and "parameters" in out
    out = CliRunner().invoke(app, [str(path), "--dry-run", "--show-config"]).stdout
    (tmp_path / "shown.yaml").write_text(out.partition("\n---\n")[2])
    assert out.startswith("fits: ") and read_yaml(tmp_path / "shown.yaml")["train"]["global_batch_size"] == 4
    for words in (
        ["--show-config"],
        ["--device-memory", "80"],
        ["--dry-run", "--device-memory", "nan"],
        ["--dry-run", "--device-memory", "0"],
    ):
        refused = CliRunner().invoke(app, [str(path), *words])
        assert isinstance(refused.exception, UsageError) and not refused.stdout


def test_replicas_beyond_a_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches shards over several nodes that nobody advises against, advice that does not fit, and advice where none is due."""

    def advice(ranks: int, room: float, **keys: Any) -> str:
        values = settings(tmp_path, **LARGE, parallel__dp_shard=-1, run__device="cuda", **keys)
        dry_run(build_config(values), ranks, None, device_bytes=room)
        return next((line for line in told(capsys) if "HSDP" in line), "")

    assert "parallel.dp_shard=8 parallel.dp_replicate=4 (HSDP) gathers within a node" in advice(32, 80 * GB)
    assert "over 16 ranks on 4 nodes" in advice(32, 80 * GB, parallel__tp=2) and "parallel.dp_shard=4" in advice(
        32, 80 * GB, parallel__tp=2
    )
    two_nodes = check(build_config(settings(tmp_path, **LARGE, parallel__dp_shard=16, parallel__dp_replicate=2)), 32)
    assert "parallel.dp_shard=16 parallel.dp_replicate=2" in advice(32, 1.001 * sum(needed(two_nodes, 32)) / ROOM)
    assert not any((advice(8, 80 * GB), advice(32, 80 * GB, parallel__accumulation="layered"), advice(32, 1 * GB)))
