"""A Hugging Face folder grown end to end and exported again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megascale.errors import UsageError
from megascale.expand.source import open_source
from megascale.expand.verify import run as run_model
from tests.runs import make_tokens, run, settings

TOKENS = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(0))


def tool(name: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, f"tools/{name}.py", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_hugging_face_folder_is_told_the_way(tmp_path: Path) -> None:
    """Catches a refusal that leaves a user of pretrained models without the next command."""
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match=r"not a whole one$"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"megascale convert .* DST --from hf --to megascale\), and give DST"):
        open_source(tmp_path)


@pytest.mark.slow
def test_a_hugging_face_folder_grows_and_goes_back(tmp_path: Path) -> None:
    """Catches a config that a converted checkpoint does not have, and a grown model that no family takes."""
    make_tokens(tmp_path / "tokens")
    assert run(settings(tmp_path, precision__compute="fp32", train__steps=3))[0] == 0
    tool("convert", str(tmp_path / "run"), str(tmp_path / "hf"), "--from", "megascale", "--to", "hf")
    tool("convert", str(tmp_path / "hf"), str(tmp_path / "ours"), "--from", "hf", "--to", "megascale")
    tool(
        "grow",
        str(tmp_path / "ours"),
        str(tmp_path / "grown"),
        "--hidden-size",
        "36",
        "--num-heads",
        "6",
        "--num-kv-heads",
        "3",
        "--num-layers",
        "4",
        "--ffn-size",
        "48",
    )
    tool("convert", str(tmp_path / "grown"), str(tmp_path / "larger"), "--from", "megascale", "--to", "hf")
    config = json.loads((tmp_path / "larger" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]) == (36, 4, 48)
    assert config["rms_norm_eps"] == pytest.approx(1e-5 * 24 / 36)
    tool("convert", str(tmp_path / "larger"), str(tmp_path / "again"), "--from", "hf", "--to", "megascale")
    logits = []
    for name in ("run", "again"):
        opened = open_source(tmp_path / name)
        logits.append(run_model(opened.model, 16, opened.read, torch.float64, TOKENS).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-5  # the grown weights are stored in fp32
