"""Branches of a run: they share its checkpoint, train on from there, and change what they were asked to change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megascale.checkpoint.trunk import branch
from megascale.commands.branch import app
from megascale.config.load import load_config, read_yaml
from megascale.errors import UsageError
from megascale.report.read import read_runs
from megascale.report.tree import tree_figure
from tests.runs import make_tokens, rows, run, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk of 8 steps with a constant rate and a phase that has begun, and one that is too late for the branches."""
    folder = tmp_path_factory.mktemp("trunk")
    make_tokens(folder / "tokens", 100)
    trunk = settings(folder, train__steps=8, optim__decay="constant", checkpoint__every=2, checkpoint__keep_last=9)
    phases = [{"from": "2 steps", "set": {"train.global_batch_size": 8}}, {"from": "6 steps", "set": {"train.clip": 0.01}}]
    assert run({**trunk, "phases": phases}) == (0, "done")
    return folder


def train(place: Path) -> list[dict[str, Any]]:
    assert run(read_yaml(place / "config.yaml")) == (0, "done")
    return rows(place.parent, "metrics") if place.name == "run" else [*map(dict, read_runs([place])[0].metrics)]


def test_a_branch_continues_and_changes(folder: Path, tmp_path: Path) -> None:
    """Catches a branch that forgets the optimizer or the data's place, changes the past, or keeps the trunk's later phases."""
    trunk = {r["step"]: r for r in rows(folder)}
    made = branch(folder / "run", 4, tmp_path / "same", ["checkpoint.every=3"])
    assert made["changes"] == {} and made["dropped"] == 1
    same = train(tmp_path / "same")
    assert [r["step"] for r in same] == [5, 6, 7, 8]
    assert [r["loss"] for r in same[:2]] == [trunk[5]["loss"], trunk[6]["loss"]]
    made = branch(folder / "run", 4, tmp_path / "decay", ["optim.decay=1-sqrt", "train.steps=7", "optim.min_lr_ratio=0"])
    assert made["changes"] == {"optim.decay": "1-sqrt", "optim.min_lr_ratio": 0}
    decay = train(tmp_path / "decay")
    assert [r["step"] for r in decay] == [5, 6, 7] and decay[0]["loss"] == trunk[5]["loss"]
    assert [r["lr"] / 3e-3 for r in decay] == pytest.approx([1 - (n / 3) ** 0.5 for n in (1, 2, 3)])


def test_files_are_shared_and_both_runs_know(folder: Path, tmp_path: Path) -> None:
    """Catches a branch that doubles the disk, and one that nobody can trace."""
    branch(folder / "run", 6, tmp_path / "b", ["optim.lr=1e-3"])
    there, here = (p / "checkpoints" / "step-00000006" for p in (folder / "run", tmp_path / "b"))
    assert {f.name for f in here.iterdir()} == {f.name for f in there.iterdir()}
    assert all(os.path.samefile(f, there / f.name) for f in here.iterdir())
    (own,) = [e for e in map(dict, _events(tmp_path / "b")) if e["event"] == "branch"]
    assert own["step"] == 6 and own["trunk"] == str((folder / "run").resolve()) and own["changes"] == {"optim.lr": 1e-3}
    assert any(e["event"] == "branched" and e["branch"] == str(tmp_path / "b") for e in _events(folder / "run"))


def _events(place: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in (place / "events.jsonl").read_text().splitlines()]


def test_the_command(folder: Path, tmp_path: Path) -> None:
    """Catches a command whose next line does not work."""
    out = tmp_path / "b"
    told = CliRunner().invoke(app, [str(folder / "run"), "--at", "4", "--out", str(out), "optim.decay=linear"])
    assert told.exit_code == 0 and f"next: megascale train {out}/config.yaml" in told.stdout
    config = load_config(out / "config.yaml")
    assert config.run.name == "b" and [p.begins for p in config.phases] == ["2 steps", "4 steps"]


@pytest.mark.parametrize(
    ("at", "out", "overrides", "words"),
    [
        (5, "b", [], "no checkpoint of step 5; it has those of steps 2, 4, 6, 8"),
        (4, "full", [], "is not empty, and nothing is overwritten"),
        (4, "b", ["train.steps=4"], "the branch begins after step 4"),
        (4, "b", ["optim.lrr=1"], "did you mean optim.lr"),
        (4, "b", ["phases=3"], "phases is 3: write a list"),
        (4, "b", ["model.hidden_size=48"], ""),
    ],
)
def test_what_is_refused(folder: Path, tmp_path: Path, at: int, out: str, overrides: list[str], words: str) -> None:
    """Catches a branch that leaves half a directory behind."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    before = (folder / "run" / "events.jsonl").read_text()
    if not words:  # the start of the branch refuses what changes a weight's form
        branch(folder / "run", at, tmp_path / out, overrides)
        code, message = run(read_yaml(tmp_path / out / "config.yaml"))
        assert code == 2 and "use grow" in message
        return
    with pytest.raises(UsageError, match=words):
        branch(folder / "run", at, tmp_path / out, overrides)
    assert not (tmp_path / "b").exists() and (folder / "run" / "events.jsonl").read_text() == before


def test_the_tree(folder: Path, tmp_path: Path) -> None:
    """Catches a branch that is drawn as a run of its own, and a page with a tree of one."""
    branch(folder / "run", 4, tmp_path / "decay", ["optim.decay=linear"])
    train(tmp_path / "decay")
    runs = read_runs([tmp_path / "decay", folder / "run"])
    figure = tree_figure(runs)
    assert figure is not None
    drawn = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert "decay" in drawn and "optim.decay linear" in drawn
    assert tree_figure(runs[1:]) is None
