"""tools/inspect_checkpoint.py, in this process and once as a command."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.states import make

TOOL = Path(__file__).parents[2] / "tools" / "inspect_checkpoint.py"


def tool(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, args)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL), run_name="__main__")
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_what_is_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a summary with wrong counts, and one that does not say which run it is of."""
    folder = make(tmp_path)
    code, out, err = tool(capsys, monkeypatch, tmp_path, "--tensors")
    assert code == 0 and err == ""
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:5]] for line in out.splitlines() if line.count("│") > 4}
    assert rows["model"][:2] == ["4", str(35 + 3 + 24)]
    assert rows["optim.m"][:2] == ["1", "36"]
    for words in (str(folder), "format version 1", "step: 1", "run.seed: 7", "rank-00001.safetensors", "model.experts [4, 1, 6] BF16"):
        assert words in out, words


def test_whole_or_not(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tool that calls a damaged checkpoint whole, or shows a traceback."""
    folder = make(tmp_path)
    code, out, _ = tool(capsys, monkeypatch, folder, "--verify")
    assert code == 0 and "whole: every file" in out
    shard = folder / "rank-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 4
    shard.write_bytes(data)
    code, _, err = tool(capsys, monkeypatch, folder)
    assert code == 0 and err == ""  # only --verify reads contents, and the summary says so
    code, _, err = tool(capsys, monkeypatch, folder, "--verify")
    assert code == 2 and "rank-00001.safetensors has checksum" in err
    shard.write_bytes(data[:-1])
    code, _, err = tool(capsys, monkeypatch, folder)
    assert code == 2 and "bytes but index.json says" in err
    shard.unlink()
    code, _, err = tool(capsys, monkeypatch, folder)
    assert code == 2 and "rank-00001.safetensors" in err


def test_the_command(tmp_path: Path) -> None:
    """Catches a tool that runs only where the tests run."""
    done = subprocess.run([sys.executable, str(TOOL), str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
