"""Stages balanced by what their parts really take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from megascale.config.load import load_config, to_yaml
from tests.runs import make_tokens, settings

ROOT = Path(__file__).resolve().parents[1]


def balance(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/balance.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def test_a_dear_head_gets_fewer_layers(tmp_path: Path) -> None:
    """Catches costs that are not measured, a split that does not hold all layers, and a line that the config does not take."""
    make_tokens(tmp_path / "tokens")
    changes = {"model__num_layers": 8, "model__vocab_size": 100_000, "parallel__pp": 2, "precision__compute": "fp32"}
    (tmp_path / "c.yaml").write_text(to_yaml(settings(tmp_path, **changes)))
    done = balance(tmp_path / "c.yaml")
    assert done.returncode == 0, done.stderr
    override = re.search(r"by measured cost: (parallel.pp_layers=\S+),", done.stdout)
    assert override is not None
    layers = load_config(str(tmp_path / "c.yaml"), [override[1]]).parallel.pp_layers
    assert layers is not None and sum(layers) == 8 and layers[0] > layers[1]


def test_nothing_to_balance(tmp_path: Path) -> None:
    """Catches a traceback, or a measurement that answers no question."""
    make_tokens(tmp_path / "tokens")
    (tmp_path / "c.yaml").write_text(to_yaml(settings(tmp_path)))
    done = balance(tmp_path / "c.yaml")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "parallel.pp" in done.stderr
