"""Room on the disk: told before the first step, and where a save fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megascale.checkpoint import room, storage
from megascale.checkpoint.room import after_failure, before_start, fitting
from megascale.config.schema import Checkpoint
from megascale.train.start.room import saves_of
from tests.checkpoint.states import checkpointer, vector


def test_what_fits() -> None:
    """Catches a keep_last that forgets the checkpoint that is being written."""
    assert [fitting(n, 10) for n in (9, 10, 19, 20, 35)] == [0, 0, 0, 1, 2]
    assert fitting(100, 10, milestones=4) == 5


def test_before_the_first_step(tmp_path: Path) -> None:
    """Catches a disk that is found too small at the second checkpoint, and a warning where there is room."""
    root = tmp_path / "run" / "checkpoints"  # is not there yet
    assert before_start(root, 10, keep_last=3, saves=9, free=40.0) is None
    sentence, facts = before_start(root, 10**9, keep_last=3, saves=9, free=3.5e9) or ("", {})
    assert "takes 1.00 GB" in sentence and "keep_last 3 needs room for 4" in sentence and "room for 3 of them (3.50 GB" in sentence
    assert "checkpoint.keep_last=2 would fit" in sentence and facts["needed_bytes"] == 4 * 10**9
    assert "not even two fit" in (before_start(root, 10**9, keep_last=1, saves=2, free=1.5e9) or ("",))[0]
    assert before_start(root, 10**9, keep_last=3, saves=1, free=1.5e9) is None  # one alone, at the end
    assert "2 of them for checkpoint.keep_every" in (before_start(root, 10**9, 1, 9, 2, free=3e9) or ("",))[0]
    folder = root / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(b"x" * 20)
    assert before_start(root, 10, keep_last=1, saves=9, free=0.0) is None  # those that are there will go


def test_how_many_are_written() -> None:
    """Catches a warning about checkpoints that a short run never writes."""
    assert saves_of(Checkpoint(every=0), 0, 100) == (1, 0)
    assert saves_of(Checkpoint(every=30), 0, 100) == (4, 0)
    assert saves_of(Checkpoint(every=30), 90, 100) == (1, 0)
    assert saves_of(Checkpoint(every=10, keep_every=20), 40, 100) == (6, 3)


def test_a_failed_save_says_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches "No space left" without how much is needed, how much there is and what would fit; 0.00 GB for kilobytes; a path after the
    advice.
    """
    saver = checkpointer(tmp_path)
    for step in (0, 1):
        saver.save(step, vector(1.0, 1000), {"step": step})

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(storage, "write_shard", full)
    monkeypatch.setattr(room, "_free", lambda root: 10.0)
    saver.save(2, vector(2.0, 1000), {"step": 2})
    message = saver.finish()[-1].message
    assert (
        message.startswith("x: No space left on device; a checkpoint takes ")
        and " kB, " in message
        and "0.00 GB" not in message
        and "2 older ones take" in message
        and message.endswith("keep_last=1 would fit, or make room there")
    )
    assert "not even two fit" in after_failure(tmp_path, 10**6, free=0.0) and after_failure(tmp_path, 10, 1e9).endswith("; make room there")
    monkeypatch.setattr(storage, "write_shard", lambda *a: (_ for _ in ()).throw(OSError(5, "Input/output error", "x")))
    saver.save(2, vector(2.0, 1000), {"step": 2})
    assert "would fit" not in saver.finish()[-1].message  # another failure than a full disk


def test_a_directory_that_is_no_longer_the_runs(tmp_path: Path) -> None:
    """Catches checkpoints written where the run does not live any more, and a run that calls itself done without any."""

    def gone() -> None:
        raise OSError(2, "run.dir is not there any more")

    saver = checkpointer(tmp_path / "checkpoints", guard=gone)
    saver.save(1, vector(1.0), {"step": 1})
    (event,) = saver.finish()
    assert event.kind == "failed" and "not there any more" in event.message and not os.listdir(tmp_path)
