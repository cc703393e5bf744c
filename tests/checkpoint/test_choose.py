"""The choice of the checkpoint to resume from: damage falls back with a warning, other errors are refused, all ranks choose the same."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.checkpoint import choose as module
from megascale.checkpoint import index as index_module
from megascale.checkpoint.choose import choose, confirm
from megascale.checkpoint.folders import step_name, steps_in
from megascale.checkpoint.grid import Chunk
from megascale.checkpoint.index import Damaged, TensorEntry, covering_problem, read_index, read_json
from megascale.checkpoint.loader import find, load, newest
from megascale.checkpoint.trainer import read_progress, read_trainer
from megascale.comm.agreement import Agreement
from megascale.comm.piece import Piece
from megascale.errors import UsageError
from tests.checkpoint.states import checkpointer, on_ranks, this_rank, vector


def save(root: Path, *steps: int) -> None:
    saver = checkpointer(root, keep_last=9)
    for step in steps:
        saver.save(step, vector(float(step)), {"step": step, "samples": step, "tokens": step, "identity": {}})
    assert {e.kind for e in saver.finish()} == {"saved"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save(tmp_path, 1, 2, 3)
    return tmp_path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link_to_nowhere(folder: Path) -> None:
    os.rename(folder, folder.parent / f"moved-{folder.name}")
    folder.symlink_to("/nowhere/step")


def rewrite(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**raw, **changes}))

    return change


SHARD = "rank-00000.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a shard": (lambda f: flip(f / SHARD), "has checksum"),
    "a shard cut short": (lambda f: os.truncate(f / SHARD, 9), "has 9 bytes"),
    "a shard gone": (lambda f: (f / SHARD).unlink(), "cannot be read"),
    "a shard is a folder": (lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()), SHARD),
    "an empty index": (lambda f: (f / "index.json").write_text(""), "index.json cannot be read"),
    "no index": (lambda f: (f / "index.json").unlink(), "there is no"),
    "an index that is a pipe": (lambda f: ((f / "index.json").unlink(), os.mkfifo(f / "index.json")), "is not a file"),
    "no trainer.json": (lambda f: (f / "trainer.json").unlink(), "there is no"),
    "another trainer.json": (rewrite("trainer.json", samples=7), "trainer.json has"),
    "a key of another type": (rewrite("trainer.json", samples="7"), "samples is '7', but it should be a whole number"),
    "a link that leads nowhere": (link_to_nowhere, "there is no"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_falls_back_and_says_why(root: Path, what: str) -> None:
    """Catches a run that stops for ever at its newest checkpoint, one that goes on from a broken one, and a fallback nobody hears of."""
    damage, words = DAMAGE[what]
    damage(root / step_name(3))
    found, skipped = choose(root)
    assert found == root / step_name(2)
    assert [s.folder.name for s in skipped] == [step_name(3)] and words in skipped[0].why
    damage(root / step_name(2))
    found, skipped = choose(root)
    assert found == root / step_name(1) and len(skipped) == 2


def test_none_whole_is_refused(root: Path) -> None:
    """Catches the silent start at step 0 where every checkpoint is damaged, for the trainer and for the tools."""
    for step in (1, 2, 3):
        (root / step_name(step) / "index.json").write_text("")
    for call in (choose, newest, find):
        with pytest.raises(UsageError, match=r"none of them is whole: .*step-00000003/index.json cannot be read.*; 2 more"):
            call(root)
    assert choose(root.parent / "nothing") == (None, []) and newest(root.parent / "nothing") is None


def test_what_latest_names_and_is_gone_is_told(root: Path) -> None:
    """Catches steps that are lost without a word because somebody deleted their folder."""
    os.rename(root / step_name(3), root.parent / "moved")
    found, skipped = choose(root)
    assert found == root / step_name(2) and "latest names step-00000003, which does not exist" in skipped[0].why
    for step in (1, 2):
        os.rename(root / step_name(step), root.parent / f"moved{step}")
    with pytest.raises(UsageError, match="latest names step-00000003"):
        choose(root)


def bad_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = Path.read_text

    def read(self: Path, *args: Any, **kwargs: Any) -> str:
        if str(self).endswith(name):
            raise OSError(5, "Input/output error", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read)


@pytest.mark.parametrize("name", ["step-00000003/index.json", "step-00000003/trainer.json", "latest"])
def test_a_disk_that_fails_is_no_damage(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches steps lost, or a run begun anew, because a disk did not answer for a moment."""
    bad_disk(monkeypatch, name)
    for call in (choose, newest):
        with pytest.raises(UsageError, match="Input/output error") as caught:
            call(root)
        assert not isinstance(caught.value, Damaged) and name in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_not_empty(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that begins anew because its folder could not be listed, or its disk is not mounted."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(OSError(116, "Stale file handle")))
        with pytest.raises(UsageError, match=r"cannot be listed \(Stale file handle\)"):
            choose(root)
    (root.parent / "link").symlink_to(root.parent / "unmounted")
    with pytest.raises(UsageError, match="is its disk mounted"):
        choose(root.parent / "link")


def test_a_newer_format_is_never_left_out(root: Path) -> None:
    """Catches an older program that goes back to what it can read and overwrites what a newer one has done."""
    rewrite("index.json", version=3)(root / step_name(3))
    for call in (choose, newest):
        with pytest.raises(UsageError, match=r"format version 3 but this program reads 1, 2"):
            call(root)


def test_a_floor_elsewhere(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Catches a phase of a growing run that goes on from before its growth, and one that begins again although it has come further."""
    grown = tmp_path_factory.mktemp("grown")
    save(grown, 2, 3)
    assert choose(root, grown / step_name(2))[0] == root / step_name(3)
    assert choose(root, grown / step_name(3))[0] == grown / step_name(3)
    flip(root / step_name(3) / SHARD)
    found, skipped = choose(root, grown / step_name(2))
    assert found == grown / step_name(2) and len(skipped) == 1
    flip(grown / step_name(3) / SHARD)
    with pytest.raises(UsageError, match=r"has checksum .*remove .*grown"):
        choose(root, grown / step_name(3))


def test_a_named_folder_is_read_before_it_is_believed(root: Path) -> None:
    """Catches a way back that moves later checkpoints away and then finds its own damaged."""
    confirm(root / step_name(2))
    flip(root / step_name(2) / SHARD)
    with pytest.raises(UsageError, match=r"has checksum .*; name another folder"):
        confirm(root / step_name(2))


def seen_late(root: str, hide_for: float, patience: float) -> str:
    """Rank 1's node does not see the newest checkpoint yet, or sees another in its place."""
    hidden = time.monotonic() + hide_for
    real = module.seal_of

    def seal(path: Path) -> str:
        if this_rank() == 1 and time.monotonic() < hidden:
            if hide_for > 50:
                return "another"
            raise FileNotFoundError(2, "No such file or directory")
        return real(path)

    module.seal_of = seal  # type: ignore[assignment]
    module.LOOK = 0.05
    try:
        path, skipped = choose(Path(root), patience=patience)
    except UsageError as error:
        return str(error)
    return f"{path.name if path else None} {len(skipped)}"


def loaded_apart(step: int) -> str:
    try:
        Agreement().same((step + this_rank(), 8), "the step after loading")
    except UsageError as error:
        return str(error)
    return "same"


@pytest.mark.dist
def test_ranks_that_loaded_different_steps_stop() -> None:
    """Catches ranks that train on together from different steps, however that came about."""
    first, second = on_ranks(2, loaded_apart, 3)
    assert first == second == "the step after loading on rank 0 is (3, 8) and on rank 1 (4, 8): does every node see the same files?"


@pytest.mark.dist
def test_all_ranks_take_the_one_that_the_first_has_chosen(root: Path) -> None:
    """Catches ranks that train on together from two checkpoints, since one node's listing was of a minute ago."""
    assert on_ranks(2, seen_late, str(root), 0.3, 20.0) == ["step-00000003 0"] * 2
    first, second = on_ranks(2, seen_late, str(root), 99.0, 0.2)
    assert first == second and "sees another in" in first and "does every node see the same run.dir" in first
    flip(root / step_name(3) / SHARD)  # rank 0 or rank 1 reads it: both leave it out
    assert on_ranks(2, seen_late, str(root), 0.0, 1.0) == ["step-00000002 1"] * 2


def staircase(count: int) -> TensorEntry:
    """Columns of chunks that begin one row further down each."""
    chunks = [Chunk((0, i), (i + 1, 1), "x") for i in range(count)] + [Chunk((i + 1, i), (count - i - 1, 1), "x") for i in range(count - 1)]
    return TensorEntry("F32", (count, count), tuple(chunks))


def test_many_chunks_are_checked_in_bounded_time() -> None:
    """Catches a check of all pairs, with which a small file keeps a program busy for hours, and one that misses an overlap."""
    entry, result = staircase(10_000), []
    thread = threading.Thread(target=lambda: result.append(covering_problem(entry)), daemon=True)
    thread.start()
    thread.join(60)
    assert result == [None]
    moved = (*entry.chunks[:-1], Chunk((0, 9_998), entry.chunks[-1].sizes, "x"))
    assert covering_problem(TensorEntry("F32", entry.shape, moved)) == "overlap"
    many = TensorEntry("F32", (2,) * 12, tuple(Chunk((0,) * 12, (1,) * 12, "x") for _ in range(2**12)))
    assert "along 12 dimensions" in str(covering_problem(many))


BAD_TRAINERS = {
    "step": -1,
    "samples": 1.5,
    "tokens": True,
    "skipped_in_a_row": 10**30,
    "identity": [],
    "config": "x",
    "logger_ids": {"wandb": 3},
    "converted": 1,
    "fingerprints": {"train": {"t": "x"}},
    "sources": [["t", "data/t", "1"]],
}


@pytest.mark.parametrize("key", BAD_TRAINERS)
def test_trainer_json_is_checked_for_everybody(root: Path, key: str) -> None:
    """Catches a KeyError or TypeError somewhere in the program for a value of another kind."""
    rewrite("trainer.json", **{key: BAD_TRAINERS[key]})(root / step_name(3))
    with pytest.raises(Damaged, match=rf"trainer.json: {key}.* is .*, but it should be"):
        read_trainer(root / step_name(3))


def test_a_checkpoint_that_no_run_wrote_is_told_from_a_damaged_one(root: Path) -> None:
    """Catches a KeyError for a converted checkpoint given to resume, and one of an older version refused for a key it did not have."""
    folder = root / step_name(3)
    assert read_progress(folder)["step"] == 3  # without skipped_in_a_row and logger_ids
    (folder / "trainer.json").write_text('{"config": {"model": {}}}')
    with pytest.raises(UsageError, match=r"it has no step, samples, tokens, identity\): start from its weights with checkpoint.init_from"):
        read_progress(folder)
    for broken in ({"model": 3}, {"grow": {}}, {"precision": {"compute": []}}):
        (folder / "trainer.json").write_text(json.dumps({"config": broken}))
        with pytest.raises(Damaged, match="config"):
            read_trainer(folder)


def test_names_that_no_disk_takes(tmp_path: Path, root: Path) -> None:
    """Catches tracebacks for paths that are too long or hold a zero byte."""
    for name in ("a" * 300, "a\0b"):
        with pytest.raises(UsageError, match="name a folder"):
            find(tmp_path / name)
    raw = json.loads((root / step_name(3) / "index.json").read_text())
    raw["files"]["a" * 300 + ".safetensors"] = raw["files"].pop(SHARD)
    (root / step_name(3) / "index.json").write_text(json.dumps(raw))
    with pytest.raises(Damaged, match="is not the name of a shard file"):
        read_index(root / step_name(3))
    assert read_json(root / step_name(2) / "trainer.json")["step"] == 2
    assert index_module.LONGEST == 255


def test_a_name_that_something_else_bears(root: Path) -> None:
    """Catches saves that fail for ever at a dangling link or a file with the step's name, at `latest` as a folder, at old temporaries."""
    (root / step_name(4)).symlink_to("/nowhere")
    (root / step_name(5)).write_text("mine")
    (root / "latest").unlink()
    (root / "latest").mkdir()
    (root / ".tmp-step-00000004").symlink_to("/nowhere")
    (root.parent / "real").mkdir()
    os.rename(root / step_name(1), root.parent / "real" / "one")
    (root / step_name(1)).symlink_to(root.parent / "real" / "one")
    saver = checkpointer(root, keep_last=2)
    for step in (4, 5):
        saver.save(step, vector(float(step)), {"step": step})
    assert [e.kind for e in saver.finish()] == ["saved", "saved"]
    assert [step for step, _ in steps_in(root)] == [4, 5] and not list(root.glob(".tmp*"))
    aside = {p.name for place in root.glob("set-aside-*") for p in place.iterdir()}
    assert aside == {step_name(4), step_name(5), "latest"}
    assert (root.parent / "real" / "one" / "index.json").is_file()  # what a link leads to is not ours to delete
    target = {"model.norm": Piece((4,), (0,), torch.zeros(4))}
    assert load(find(root), target)["step"] == 5
