"""Resumes as users meet them: damage, ways back, other lengths and mixtures, left-overs. One process each, so that a case is a second."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megascale.checkpoint import room
from megascale.checkpoint.folders import step_name
from megascale.checkpoint.index import read_index
from megascale.config.load import build_config
from megascale.data.indexed import TokenWriter
from megascale.launch.ranks import RankInfo
from megascale.train.setup import build_trainer
from megascale.train.start import branch
from megascale.train.start.lock import LOCK
from megascale.train.start.resume import RunStart
from megascale.train.start.room import checkpoint_bytes
from tests.runs import VOCAB, losses, make_tokens, rows, run, settings

SHARD = "rank-00000.safetensors"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with a checkpoint after each; copied, never changed."""
    folder = tmp_path_factory.mktemp("done")
    make_tokens(folder / "tokens")
    assert run(values_of(folder)) == (0, "done")
    assert not (folder / "run" / LOCK).exists()
    return folder


@pytest.fixture
def folder(done: Path, tmp_path: Path) -> Path:
    shutil.copytree(done / "run", tmp_path / "run")
    for end in ("bin", "idx"):
        os.link(done / f"tokens.{end}", tmp_path / f"tokens.{end}")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(done), str(tmp_path)))
    for trainer in (tmp_path / "run").glob("checkpoints/*/trainer.json"):
        rewrite(trainer.parent, trainer.read_text().replace(str(done), str(tmp_path)))
    return tmp_path


def values_of(folder: Path, **changes: Any) -> dict[str, Any]:
    fixed = {"model__num_layers": 1, "checkpoint__every": 1, "checkpoint__keep_last": 9, "checkpoint__asynchronous": False}
    return settings(folder, **{**fixed, **changes})


def rewrite(folder: Path, text: str) -> None:
    """A checkpoint whose trainer.json is `text`, and whole."""
    import zlib

    (folder / "trainer.json").write_text(text)
    index = json.loads((folder / "index.json").read_text())
    index["files"]["trainer.json"] = {"bytes": len(text.encode()), "crc32": zlib.crc32(text.encode())}
    (folder / "index.json").write_text(json.dumps(index))


def step_folder(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / step_name(step)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in rows(folder, "events") if e["event"] == kind]


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_damaged_newest_checkpoint_is_left_out_aloud(folder: Path, done: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a dead end at a flipped bit, and a fallback that nobody hears of or that leaves the curve another."""
    flip(step_folder(folder, 6) / SHARD)
    assert run(values_of(folder)) == (0, "done")
    (event,) = events(folder, "checkpoint_skipped")
    assert event["folder"].endswith(step_name(6)) and "checksum" in event["why"] and event["step"] == 5
    assert "warning: step-00000006 is skipped" in capfd.readouterr().err
    assert losses(folder) == losses(done)


@pytest.mark.parametrize("what", ["empty", "newer", "unmounted"])
def test_what_cannot_be_read_never_begins_at_step_0(folder: Path, what: str) -> None:
    """Catches a run that begins anew over its own checkpoints and rows, with exit code 0."""
    root = folder / "run" / "checkpoints"
    for index in root.glob("*/index.json"):
        index.write_text("" if what == "empty" else index.read_text().replace('"version": 1,', '"version": 99,'))
    if what == "unmounted":
        os.rename(root, folder / "away")
        root.symlink_to(folder / "nowhere")
    before = tree(folder / "run")
    code, message = run(values_of(folder))
    assert (
        code == 2 and {"empty": "none of them is whole", "newer": "format version 99", "unmounted": "is its disk mounted"}[what] in message
    )
    assert tree(folder / "run") == before
    code, message = run(values_of(folder, checkpoint__resume="never"))
    assert code == 2 and tree(folder / "run") == before


@pytest.mark.parametrize("name", ["checkpoints", "hf"])
def test_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches a run that trains to its end and finds there that another user owns the folder of its checkpoints."""
    (folder / "run" / name).mkdir(exist_ok=True)
    before, real = tree(folder / "run"), Path.touch

    def touch(self: Path, *args: Any, **more: Any) -> None:
        if self.parent == folder / "run" / name:
            raise PermissionError(13, "Permission denied", str(self))
        real(self, *args, **more)

    monkeypatch.setattr(Path, "touch", touch)
    code, message = run(values_of(folder, train__steps=8, checkpoint__export="hf"))
    assert code == 2 and f"{folder / 'run' / name} cannot be written (Permission denied)" in message
    assert tree(folder / "run") == before
    monkeypatch.undo()
    if name == "checkpoints":
        assert run(values_of(folder)) == (0, "done") and not list((folder / "run" / name).glob(".tmp*"))


def test_going_back_inside_a_run(folder: Path, done: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches `resume=FOLDER` that is ignored, one that goes back at every requeue, and a branch that destroys the one before."""
    three = str(step_folder(folder, 3))
    back = values_of(folder, checkpoint__resume=three, train__clip=0.001)
    assert run(back, stop_at=4)[0] == 75
    assert [r["step"] for r in rows(folder)] == [1, 2, 3, 4, 5]
    assert losses(folder)[:4] == losses(done)[:4] and losses(folder)[4] != losses(done)[4]  # another branch
    (event,) = events(folder, "go_back")
    aside = Path(event["where"])
    assert event["set_aside"] == [step_name(n) for n in (4, 5, 6)] and "gone back to step-00000003" in capfd.readouterr().err
    assert sorted(p.name for p in aside.iterdir()) == ["metrics.jsonl", *event["set_aside"]]
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == 6
    assert run(back) == (0, "done")  # the same command, as a scheduler repeats it
    assert len(events(folder, "go_back")) == 1 and [e["step"] for e in events(folder, "resume")][-1] == 5
    assert "was carried out on" in capfd.readouterr().err
    shutil.rmtree(three)  # as keep_last may
    assert run(back) == (0, "done")
    # Into what was set aside: the first branch is whole again.
    first = values_of(folder, checkpoint__resume=str(aside / step_name(5)))
    assert run(first) == (0, "done")
    assert losses(folder)[5] == losses(done)[5]
    # A start with auto in between forgets the request.
    assert run(values_of(folder)) == (0, "done")
    four = values_of(folder, checkpoint__resume=str(step_folder(folder, 5)))
    assert run(four) == (0, "done") and len(events(folder, "go_back")) == 3


def tree_of_steps(folder: Path) -> dict[str, bytes]:
    """The run's checkpoints that are not set aside, and its curve."""
    root = folder / "run" / "checkpoints"
    return {**{p.name: (p / SHARD).read_bytes() for p in root.glob("step-*")}, "rows": (folder / "run" / "metrics.jsonl").read_bytes()}


@pytest.mark.parametrize("killed", range(9))
def test_back_to_the_first_branch(folder: Path, done: Path, monkeypatch: pytest.MonkeyPatch, killed: int) -> None:
    """Catches the other branch's rows and checkpoints under the first branch's weights, a count that leaves out the one that was replaced,
    and a way back that the same request does not end where it was killed between any two acts.
    """
    root, names = folder / "run" / "checkpoints", [step_name(n) for n in (4, 5, 6)]
    metrics = folder / "run" / "metrics.jsonl"
    first = tree_of_steps(folder)
    three = str(root / step_name(3))
    aside = Path(branch.go_back(folder / "run", Path(three), three).details["where"])
    other = [json.dumps({**json.loads(line), "loss": 9.0}) + "\n" for line in first["rows"].decode().splitlines()]
    metrics.write_text("".join([*first["rows"].decode().splitlines(True)[:3], *other[3:]]))
    for name in names:  # as a second branch of the same length
        shutil.copytree(aside / name, root / name)
        (root / name / SHARD).write_bytes(b"second")
    second, asked = metrics.read_bytes(), str(aside / step_name(6))

    def ask() -> list[branch.Note]:
        wish = branch.wish_of(asked, folder / "run")
        assert wish.folder is not None or wish.note is not None
        return [] if wish.folder is None else [branch.go_back(folder / "run", wish.folder, asked)]

    acts = 0

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def act(*args: Any) -> None:
            nonlocal acts
            acts += 1
            if acts == killed:
                raise KeyboardInterrupt
            real(*args)

        return act

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    notes = []
    with contextlib.suppress(KeyboardInterrupt):
        notes = ask()
    monkeypatch.undo()
    if not killed:
        assert notes[0].details["set_aside"] == names and notes[0].details["rows_put_back"] == 3 and acts == 8
        assert "; 3 checkpoints of the branch that is left" in notes[0].sentence and "3 rows of metrics.jsonl" in notes[0].sentence
    ask()
    kept = {n: v for n, v in first.items() if n not in names[:2]}
    assert tree_of_steps(folder) == kept and (root / "latest").read_text() == names[2] + "\n"
    places = [p for p in root.glob("set-aside-*") if p != aside]
    assert sorted(p.name for place in places for p in place.glob("step-*")) == names
    assert all((p / "metrics.jsonl").read_bytes() == second for p in places if list(p.glob("step-*")))


def test_back_with_the_branchs_own_config(folder: Path, done: Path) -> None:
    """Catches a way back to the first branch, with its own config, that is refused for the second one's config.yaml; and one that was
    killed before config.yaml was written anew.
    """
    lr = 2 * values_of(folder)["optim"]["lr"]
    second = values_of(folder, optim__lr=lr, checkpoint__resume=str(step_folder(folder, 3)), run__allow_change=["optim.lr"])
    assert run(second) == (0, "done")
    config = folder / "run" / "config.yaml"
    theirs = config.read_bytes()
    (aside,) = (folder / "run" / "checkpoints").glob("set-aside-*")
    before = tree(folder / "run")
    code, message = run(values_of(folder, optim__lr=1.0, checkpoint__resume=str(aside / step_name(6))))
    assert code == 2 and f"the one in {aside / step_name(6)}:" in message and "optim.lr: 0.003 there, 1.0 now" in message
    assert tree(folder / "run") == before
    first = values_of(folder, checkpoint__resume=str(aside / step_name(6)))
    assert run(first) == (0, "done") and losses(folder) == losses(done)
    config.write_bytes(theirs)  # as after a kill
    assert run(first) == (0, "done") and config.read_bytes() != theirs
    code, message = run(values_of(folder, optim__lr=lr))
    assert code == 2 and "optim.lr: 0.003 there, 0.006 now" in message


def test_ways_back_that_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Catches a path that is not there and is passed over, a damaged target, another run's folder over a run, and a half way back."""
    before = tree(folder / "run")
    code, message = run(values_of(folder, checkpoint__resume="/nowhere"))
    assert code == 2 and "checkpoint.resume is '/nowhere', but it cannot be found (No such file" in message
    flip(step_folder(folder, 3) / SHARD)
    code, message = run(values_of(folder, checkpoint__resume=str(step_folder(folder, 3))))
    assert code == 2 and "checksum" in message and "name another folder" in message
    flip(step_folder(folder, 3) / SHARD)
    code, message = run(values_of(folder, checkpoint__resume=str(step_folder(folder, 3)), optim__lr=1.0))
    assert code == 2 and "optim.lr" in message
    other = tmp_path_factory.mktemp("other") / "other-run"
    shutil.copytree(folder / "run", other)
    code, message = run(values_of(folder, checkpoint__resume=str(other)))
    assert code == 2 and "did not begin there" in message
    assert tree(folder / "run") == before
    for same in (folder / "run", folder / "run" / "checkpoints"):
        assert run(values_of(folder, checkpoint__resume=str(same))) == (0, "done")


def test_a_run_that_begins_from_another(folder: Path, tmp_path: Path) -> None:
    """Catches a requeue that begins at the other run again, or that needs it when it has gone."""
    old = tmp_path / "old"
    os.rename(folder / "run", old)
    values = values_of(folder, checkpoint__resume=str(old / "checkpoints" / step_name(2)))
    assert run(values, stop_at=3)[0] == 75
    assert [r["step"] for r in rows(folder)] == [3, 4]
    shutil.rmtree(old)
    assert run(values) == (0, "done")
    assert [r["step"] for r in rows(folder)] == [3, 4, 5, 6]


def test_another_length_is_told_and_recorded(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a learning rate that jumps at a resume in silence, and a key that changes the curve unrecorded."""
    assert run(values_of(folder, train__steps=7, train__clip=0.5, checkpoint__resume=str(step_folder(folder, 4)))) == (0, "done")
    (event,) = events(folder, "change")
    assert event["changes"] == {"train.steps": [6, 7], "train.clip": [1.0, 0.5]} and event["step"] == 4
    assert event["lr"][1] == rows(folder)[4]["lr"] and event["lr"][0] < event["lr"][1]
    said = capfd.readouterr().err
    assert "train.steps was 6 and is 7" in said and "the learning rate of step 5 would have been" in said
    assert run(values_of(folder, train__steps=7, train__clip=0.5)) == (0, "done")
    assert len(events(folder, "change")) == 1  # nothing has changed since


def test_a_start_without_checkpoints_keeps_the_rows(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a run that begins at step 1 again since the disk of its checkpoints is not mounted; where that is asked for, rows dropped for
    good, and exit.json of the attempt before; and one killed before its first checkpoint that the same command does not start again.
    """
    shutil.rmtree(folder / "run" / "checkpoints")
    (folder / "run" / "checkpoints").mkdir()  # where a disk would be mounted
    before = tree(folder / "run")
    code, message = run(values_of(folder))
    assert code == 2 and "checkpoint of step 6 was saved, but there is none in" in message and "resume=never starts again" in message
    assert tree(folder / "run") == before
    (folder / "run" / "exit.json").write_text('{"code": 75}')
    old = (folder / "run" / "metrics.jsonl").read_bytes()
    assert run(values_of(folder, train__steps=1, checkpoint__resume="never")) == (0, "done")
    assert (folder / "run" / "metrics.jsonl.before").read_bytes() == old and len(rows(folder)) == 1
    kept = folder.resolve() / "run" / "metrics.jsonl.before"  # whole: a log that is a link has it on another disk
    assert f"are kept in {kept}" in capfd.readouterr().err and not (folder / "run" / "exit.json").exists()
    shutil.rmtree(folder / "run" / "checkpoints")
    lines = (folder / "run" / "events.jsonl").read_text().splitlines(True)
    (folder / "run" / "events.jsonl").write_text("".join(line for line in lines[:-1] if '"saved"' not in line))  # as after a kill
    assert run(values_of(folder, train__steps=1)) == (0, "done")


def test_a_stop_file_from_before(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a start that ends after a step, for a file that somebody had forgotten, without having said so when it began."""
    stop = folder / "run" / "STOP"
    stop.touch()
    assert run(values_of(folder, train__steps=9))[0] == 75 and not stop.exists()
    said = f"warning: {stop} exists: this start stops at its first step"
    assert said in capfd.readouterr().err
    assert run(values_of(folder, train__steps=9)) == (0, "done") and said not in capfd.readouterr().err


DAMAGED_CONFIG: dict[str, Callable[[Path], object]] = {
    "cut": lambda p: p.write_text(p.read_text()[:200]),
    "no text": lambda p: p.write_bytes(b"\xff\xfe\x00"),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
    "of a newer version": lambda p: p.write_text(p.read_text() + "later: {key: 1}\n"),
}


@pytest.mark.parametrize("what", DAMAGED_CONFIG)
def test_a_damaged_config_of_the_run(folder: Path, what: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a run that can never go on for a file that it wrote itself, and a message that seems to speak of the user's config."""
    path = folder / "run" / "config.yaml"
    DAMAGED_CONFIG[what](path)
    code, message = run(values_of(folder, optim__lr=1.0))
    assert code == 2 and "optim.lr" in message and step_name(6) in message  # the checkpoint's own config stands for it
    assert run(values_of(folder)) == (0, "done")
    assert f"{path}, which the run wrote, is" in capfd.readouterr().err and len(events(folder, "config_replaced")) == 1
    assert path.is_file() and list((folder / "run").glob("set-aside-*/config.yaml"))


def test_left_overs_are_swept(folder: Path) -> None:
    """Catches half files of killed attempts that stay for ever, and somebody's file taken for one."""
    names = [".config.yaml.77.tmp", ".metrics.jsonl.77.tmp", ".exit.json.0.tmp", ".heartbeat.json.7.tmp", ".writable"]
    for name in names:
        (folder / "run" / name).write_text("half")
    root = folder / "run" / "checkpoints"
    (root / ".tmp-step-00000009").symlink_to("/nowhere")
    (root / ".tmp-del-step-00000001").mkdir()
    (folder / "run" / ".notes").write_text("mine")
    (root / step_name(99)).write_text("mine")
    assert run(values_of(folder)) == (0, "done")
    assert not any((folder / "run" / name).exists() for name in names) and not list(root.glob(".tmp*"))
    assert (folder / "run" / ".notes").read_text() == "mine"
    assert [p.read_text() for p in root.glob(f"set-aside-*/{step_name(99)}")] == ["mine"]
    assert len(events(folder, "set_aside")) == 1


def test_the_directory_is_held_while_training(folder: Path) -> None:
    """Catches a second job in the directory, one that disturbs the first, and a directory made anew when it was moved away."""
    values = values_of(folder, train__steps=8)
    with build_trainer(build_config(values), RankInfo()) as trainer:
        before = tree(folder / "run")
        code, message = run(values)
        assert code == 2 and f"held by another job: process {os.getpid()} on" in message and tree(folder / "run") == before
        os.rename(folder / "run", folder / "moved")
        with pytest.raises(Exception, match=r"could not be written: the run directory .* no longer exists"):
            trainer.train()
        assert not (folder / "run").exists()


def test_weights_that_are_no_numbers(folder: Path, tmp_path: Path) -> None:
    """Catches steps skipped one after another, and a wrong cause told, for weights that were NaN from the start."""
    for target in (step_folder(folder, 6), tmp_path / "weights"):
        if target.name == "weights":
            shutil.copytree(step_folder(folder, 5), target)
        tensors = load_file(target / SHARD)
        tensors["model.blocks.0.ffn.up.weight"][3, 2] = torch.nan
        (target / SHARD).unlink()
        save_file(tensors, target / SHARD)
        rewrite_index(target)
    code, message = run(values_of(folder))
    assert code == 2 and "model.blocks.0.ffn.up.weight in" in message and "not finite" in message
    code, message = run(values_of(folder, run__dir=str(tmp_path / "new"), checkpoint__init_from=str(tmp_path / "weights")))
    assert code == 2 and "not finite" in message and not (tmp_path / "new").exists()


def rewrite_index(folder: Path) -> None:
    """The index of a shard that was written anew."""
    import zlib

    data = (folder / SHARD).read_bytes()
    index = json.loads((folder / "index.json").read_text())
    index["files"][SHARD] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    (folder / "index.json").write_text(json.dumps(index))


def test_room_is_looked_at_before_the_first_step(
    done: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a disk that is found too small when the second checkpoint is written, and a count of bytes that is not the checkpoint's."""
    index = read_index(step_folder(done, 6))
    config = build_config(values_of(done))
    assert checkpoint_bytes(config, RunStart()) == sum(t.nbytes for t in index.tensors.values())
    assert checkpoint_bytes(config, RunStart(index.folder)) == sum(f.bytes for f in index.files.values())
    monkeypatch.setattr(room, "_free", lambda root: 0.0)
    assert run(values_of(folder, train__steps=7, checkpoint__keep_last=3)) == (0, "done")
    assert not events(folder, "disk_room")  # older ones will go
    assert run(values_of(folder, train__steps=8, checkpoint__keep_last=9)) == (0, "done")
    (event,) = events(folder, "disk_room")
    assert event["needed_bytes"] > event["held_bytes"] and event["free_bytes"] == 0
    assert "warning: a checkpoint takes" in capfd.readouterr().err


def test_weights_named_by_a_path_that_cannot_be(folder: Path) -> None:
    """Catches tracebacks for paths that are too long or hold a zero byte."""
    for path in ("a" * 300, "a\0b", "\ud800"):
        for key in ("checkpoint__init_from", "checkpoint__resume", "run__dir"):
            values = values_of(folder, **{"run__dir": str(folder / "new"), key: path})
            code, message = run(values)
            assert code == 2 and (key.replace("__", ".") in message or "is not a checkpoint and holds none" in message), (key, message)
            assert not (folder / "new").exists()


def test_other_data_under_the_same_name(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a corpus that was made anew under a run, which went on in it without a word, and one refused for having moved."""
    (folder / "away").mkdir()
    for end in ("bin", "idx"):
        os.rename(folder / f"tokens.{end}", folder / "away" / f"tokens.{end}")
    assert run(values_of(folder, data__train=str(folder / "away" / "tokens"))) == (0, "done")  # the same data elsewhere
    tokens = np.fromfile(folder / "away" / "tokens.bin", np.uint16)
    tokens[::-1].tofile(folder / "tokens.bin")
    shutil.copy(folder / "away" / "tokens.idx", folder)
    before = tree(folder / "run")
    back = values_of(folder, checkpoint__resume=str(step_folder(folder, 5)))
    for values in (values_of(folder), back):
        code, message = run(values)
        assert (
            code == 2 and f"the files of tokens differ from those that the run was trained on (bin was {tokens.nbytes} bytes, " in message
        )
        assert "run.allow_change='[data.train]'" in message and tree(folder / "run") == before
    assert run({**back, "run": {**back["run"], "allow_change": ["data.train"]}}) == (0, "done")
    (event,) = events(folder, "change")
    assert list(event["changes"]) == ["data.train[tokens]"] and "data.train[tokens] was" in capfd.readouterr().err
    assert run(values_of(folder)) == (0, "done")  # it is the run's own data from now on
    for path in (folder / "run" / "checkpoints").glob("step-*"):
        trainer = json.loads((path / "trainer.json").read_text())
        del trainer["fingerprints"]
        rewrite(path, json.dumps(trainer))
    tokens.tofile(folder / "tokens.bin")
    assert run(values_of(folder)) == (0, "done")  # older checkpoints do not say what the data were


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mixed")
    for name in ("a", "b"):
        with TokenWriter(folder / name, np.uint16) as writer:
            writer.add(np.arange(600) % VOCAB)
    (folder / "mix.yaml").write_text("sources: [{path: a}, {path: b}]\n")
    return folder, values_of(folder, data__train=str(folder / "mix.yaml"), train__steps=3)


def test_a_mixture_that_changes(mixed: tuple[Path, dict[str, Any]], capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a file of sources edited under a run without a word, and a change that is allowed and not recorded."""
    folder, values = mixed
    assert run(values) == (0, "done")
    (folder / "mix.yaml").write_text("sources: [{path: a, weight: 3}, {path: b}]\n")
    code, message = run(values)
    assert code == 2 and "was a 1, b 1 and is a 3, b 1" in message and "run.allow_change='[data.train]'" in message
    values["run"]["allow_change"] = ["data.train"]
    values["train"]["steps"] = 4
    assert run(values) == (0, "done")
    (event,) = events(folder, "mixture")
    assert (event["then"], event["now"]) == ("a 1, b 1", "a 3, b 1")
    assert "every source continues where it was" in capfd.readouterr().err
    assert "data.train" in events(folder, "change")[0]["changes"]


def test_megatrons_order_depends_on_the_length(mixed: tuple[Path, dict[str, Any]]) -> None:
    """Catches a run that is made longer and goes on in another order of its data."""
    folder, values = mixed
    values = {**values, "run": {**values["run"], "dir": str(folder / "other")}, "data": {"train": str(folder / "a"), "order": "megatron"}}
    values["train"] = {**values["train"], "steps": 2}
    assert run(values) == (0, "done")
    longer = {**values, "train": {**values["train"], "steps": 3}}
    code, message = run(longer)
    assert code == 2 and "train.steps was 2 and is now 3; under data.order megatron" in message
    longer["run"] = {**longer["run"], "allow_change": ["train.steps"]}
    assert run(longer) == (0, "done")


@pytest.mark.parametrize("name", [".", ".."])
def test_names_that_lead_elsewhere(name: str, tmp_path: Path) -> None:
    """Catches a run whose files land in the working directory."""
    code, message = run(settings(tmp_path, run__name=name))
    assert code == 2 and "run.name" in message
