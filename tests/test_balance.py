"""Stages balanced by what their parts really take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megascale.analysis import stage_costs
from megascale.commands.balance import app
from megascale.config.load import load_config, to_yaml
from megascale.config.schema import Config
from megascale.config.stages import StagePart
from tests.runs import make_tokens, settings

ROOT = Path(__file__).resolve().parents[1]


def balance(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/balance.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def config_file(folder: Path) -> Path:
    make_tokens(folder / "tokens")
    changes = {"model__num_layers": 8, "model__vocab_size": 10_000, "parallel__pp": 2, "precision__compute": "fp32"}
    file = folder / "c.yaml"
    file.write_text(to_yaml(settings(folder, **changes)))
    return file


def offered(printed: str) -> str:
    """The override of the measured split, as a user would copy it."""
    found = re.search(r"by measured cost: (parallel.pp_layers=\S+),", printed)
    assert found is not None, printed
    return found[1]


def layers_by(costs: dict[str, float], file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...] | None:
    def seconds(config: Config, part: StagePart, device: torch.device) -> float:
        return costs["embedding" if part.first else "head" if part.last else "layer"]

    monkeypatch.setattr(stage_costs, "seconds", seconds)
    done = CliRunner().invoke(app, [str(file)])
    assert done.exit_code == 0, done.output
    return load_config(str(file), [offered(done.output)]).parallel.pp_layers


def test_layers_follow_the_measured_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a split by other costs than the measured ones, costs of the wrong end, and a line that the config does not take."""
    file = config_file(tmp_path)
    assert layers_by({"layer": 1.0, "embedding": 0.0, "head": 0.0}, file, monkeypatch) == (4, 4)
    assert layers_by({"layer": 1.0, "embedding": 0.0, "head": 4.0}, file, monkeypatch) == (6, 2)
    assert layers_by({"layer": 1.0, "embedding": 6.0, "head": 0.0}, file, monkeypatch) == (1, 7)


def test_costs_are_measured(tmp_path: Path) -> None:
    """Catches a part that does not run alone, and a split that does not hold all layers; what it should be is the machine's matter."""
    file = config_file(tmp_path)
    done = balance(file)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"[1-9]\S* ms forward and backward", done.stdout)) == 3
    layers = load_config(str(file), [offered(done.stdout)]).parallel.pp_layers
    assert layers is not None and sum(layers) == 8


def test_nothing_to_balance(tmp_path: Path) -> None:
    """Catches a traceback, or a measurement that answers no question."""
    make_tokens(tmp_path / "tokens")
    (tmp_path / "c.yaml").write_text(to_yaml(settings(tmp_path)))
    done = balance(tmp_path / "c.yaml")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "parallel.pp" in done.stderr
