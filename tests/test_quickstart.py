"""The README's first command in small: prepare, train on two processes, stop, resume on another layout, grow, report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megascale.report.read import read_run
from megascale.report.series import gap

SMALL = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_size=128",
    "train.steps=40",
    "train.seq_len=32",
    "train.eval_every=10",
    "train.eval_steps=1",
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
    "checkpoint.every=10",
    "data.valid_fraction=0.1",
]


@pytest.mark.dist
def test_quickstart(tmp_path: Path) -> None:
    """Catches commands of the README that no longer work together, and a curve that is not one curve."""
    words = ["alpha beta gamma delta", "one two three four five six", "to be or not to be"]
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text("".join(f"{words[(i + n) % 3]}, {n % 10}.\n" for n in range(60)))
    prefix = tmp_path / "data" / "words"

    def call(*args: object) -> str:
        done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    call("tools/prepare_data.py", tmp_path / "text", "--out", prefix, "--vocab-size", 295)
    runs = tmp_path / "runs"
    said = call("tools/quickstart.py", "--folder", runs, "--data", prefix, *(x for o in SMALL for x in ("--override", o)))
    assert "learned" in said
    resumed, straight = read_run(runs / "quickstart"), read_run(runs / "quickstart-undisturbed")
    assert [s["layout"] for s in resumed.starts] == ["dp_shard2", "tp2", "tp2"]
    for run in (resumed, straight):
        (grown,) = (e for e in run.events if e["event"] == "grow")
        assert grown["step"] == 30 and grown["logits_moved"] < 1e-10
    assert "the model grew" in said
    apart = gap(resumed, straight)
    assert apart.steps.tolist() == list(range(1, 41)) and apart.delta.max() < 1e-4
    assert [e["event"] for e in resumed.events if e["event"] in ("stop", "done")] == ["stop", "done"]
    # By the step, not by the clock: when 20 of 40 is logged, the file is there.
    assert 20 <= next(e["step"] for e in resumed.events if e["event"] == "stop") <= 21
    page = (runs / "report.html").read_text()
    assert page.count("<svg") >= 5 and "unigram entropy" in page and (runs / "quickstart.png").stat().st_size > 10_000
