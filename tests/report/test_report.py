"""Reports: half-written files, gaps, and nothing of a run that could act in a browser."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megascale.errors import UsageError
from megascale.report.page import page
from megascale.report.read import gap, read_run


def make_run(folder: Path, name: str, shift: float = 0.0, steps: int = 20) -> Path:
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {
            "step": s,
            "loss": None if s == 7 else 5 / s + shift,
            "grad_norm": 1.0,
            "lr": 1e-3,
            "sent_bytes": {"tp": 10},
            "tokens_per_second": 9.0,
        }
        for s in range(1, steps + 1)
    ]
    rows[9]["valid_loss"] = {"web": 2.5}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 21, "lo')
    events = [
        {"time": 1.0, "step": 0, "event": "start", "layout": "dp_shard2", "unigram_entropy": 4.0},
        {"time": 2.0, "step": 10, "event": "resume", "layout": "<script>alert(1)</script>"},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (folder / "config.yaml").write_text(f"run: {{name: {name}, seed: {shift}}}\n")
    return folder


def test_page_of_two_runs(tmp_path: Path) -> None:
    """Catches scripts from a run's own words, a crash on null or on a half-written last line, and Δ against the wrong run."""
    a, b = read_run(make_run(tmp_path / "a", "a", 0.5)), read_run(make_run(tmp_path / "b", "b", steps=15))
    steps, delta = gap(a, b)
    assert steps.tolist() == list(range(1, 16))
    assert [d for d in delta if d == d] == pytest.approx([0.5] * 14)
    text = page([a, b], "<b>title</b>")
    assert "<script" not in text and "&lt;script&gt;" in text and "<b>title" not in text
    assert "run.seed" in text


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "metrics.jsonl").unlink(), "is no run"),
        (lambda f: (f / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n'), "line 2 is not JSON"),
        (lambda f: (f / "metrics.jsonl").write_text(""), "no rows yet"),
    ],
)
def test_what_is_no_run(tmp_path: Path, spoil: Any, words: str) -> None:
    """Catches tracebacks on folders that are something else."""
    folder = make_run(tmp_path / "a", "a")
    spoil(folder)
    with pytest.raises(UsageError, match=words):
        read_run(folder)
    done = subprocess.run([sys.executable, "tools/report.py", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
