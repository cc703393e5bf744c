"""docs/python.md is a program: its blocks run, in order, in one folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
BLOCK = re.compile(r"^```(\w+)(?: title=\"(.+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.dist
def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page that promises what the library does not do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PAGE.parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names: dict[str, Any] = {}
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) * 2 == text.count("```")
    for block in blocks:
        language, file, code = block.groups()
        line = text[: block.start()].count("\n") + 1
        if file is not None:
            Path(file).write_text(code, encoding="utf-8")
        elif language == "python":
            exec(compile("\n" * line + code, str(PAGE), "exec"), names)
        else:
            command = code.split()
            assert (language, command[0]) == ("sh", "torchrun")
            done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *command[1:]], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
