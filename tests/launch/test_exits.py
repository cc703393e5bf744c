"""The ending of every error and its exit.json: a message and a code that scripts may rely on."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megascale.commands import train as pretrain
from megascale.config.load import build_config, to_yaml
from megascale.launch.exits import Exit, as_exit, of_this_run, write_exit
from megascale.launch.ranks import RankInfo
from megascale.train.faults.stop import StopFlag
from tests.runs import make_tokens, settings


def caused(error: Exception) -> Exception:
    """Wraps an error like the pipeline's runtime."""
    wrapped = RuntimeError("stage 1 failed")
    wrapped.__cause__ = error
    return wrapped


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?"), 5),
        (dist.DistStoreError("wait over"), 5),
        (dist.DistBackendError("unhandled system error"), 5),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), 5),
        (ConnectionResetError(104, "Connection reset by peer"), 5),
        (dist.DistNetworkError("The server socket has failed to bind to [::]:29500 (errno: 98 - Address already in use)."), 2),
        (MemoryError(), 4),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), 4),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), 2),
        (RuntimeError("No available kernel. Aborting execution."), 3),
        (RecursionError("maximum recursion depth exceeded"), 2),
        (caused(dist.DistNetworkError("gone")), 5),
        (ValueError("timeout must be positive"), None),
        (RuntimeError("shapes (2, 3) and (4, 5) cannot be multiplied"), None),
    ],
)
def test_what_errors_come_to(error: Exception, code: int | None) -> None:
    """Catches a peer lost while starting, a full disk or deep nesting that end with a traceback, and bugs that are taken for such."""
    found = as_exit(error)
    assert (None if found is None else found.code) == code
    assert found is None or ("\n" not in found.reason and len(found.reason) < 400)
    assert not isinstance(error, OSError) or code == 5 or found is None or error.strerror in found.reason


RANK0, RANK1 = RankInfo(0, 2, 0, 2), RankInfo(1, 2, 1, 2)


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "exit.json").read_text())  # type: ignore[no-any-return]


def test_the_first_verdict_stays(tmp_path: Path) -> None:
    """Catches a rank that was frozen, and calls the others lost when it wakes, over the word of those who saw it silent."""
    write_exit(tmp_path, Exit(5, "rank 0 on n1 is silent for 20 s"), RANK1, 7)
    write_exit(tmp_path, Exit(5, "rank 1 is gone"), RANK0, 7)
    assert told(tmp_path)["reason"] == "rank 0 on n1 is silent for 20 s"
    write_exit(tmp_path, Exit(3, "NaN"), RANK0, 8)
    assert told(tmp_path)["code"] == 3


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    """Catches an ending that nobody is told since a folder has the name."""
    (tmp_path / "exit.json").mkdir()
    write_exit(tmp_path, Exit(0, "done"), RANK0, 7)
    assert told(tmp_path)["code"] == 0 and (tmp_path / "exit.json.set-aside").is_dir()


def earlier(folder: Path, **changes: Any) -> dict[str, Any]:
    """What an attempt left that asked to be run again; the values of its config."""
    (folder / "run").mkdir()
    values = settings(folder, **changes)
    (folder / "run" / "config.yaml").write_text(to_yaml(build_config(values).plain()))
    (folder / "run" / "exit.json").write_text(json.dumps({"code": 75, "reason": "stopped"}))
    return values


@pytest.fixture(autouse=True)
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals stay pytest's own."""
    monkeypatch.setattr(StopFlag, "listen", lambda self: None)


def start(folder: Path, values: dict[str, Any], *more: str) -> int:
    (folder / "now.yaml").write_text(to_yaml(values))
    dry = pretrain.DryRun() if "--dry-run" in more else None
    return pretrain.run(str(folder / "now.yaml"), [item for item in more if "=" in item], dry)


def test_a_refused_start_is_told_to_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a script that obeys "75: run again" for ever, since the refused start left the file of the attempt before."""
    values = earlier(tmp_path)
    values["optim"]["lr"] = 1.0
    assert start(tmp_path, values) == 2
    assert told(tmp_path / "run")["code"] == 2 and "optim.lr: 0.003 there, 1.0 now" in told(tmp_path / "run")["reason"]
    assert told(tmp_path / "run")["reason"] in capsys.readouterr().err


@pytest.mark.parametrize("change", ["run.name=other", "model.num_layers=3", "--dry-run"])
def test_other_runs_are_left_alone(tmp_path: Path, change: str) -> None:
    """Catches a refused start that writes into the directory of another run, and a dry run that writes anything."""
    assert start(tmp_path, earlier(tmp_path), change, f"data.train={tmp_path / 'nowhere'}", "parallel.tp=7") == 2
    assert told(tmp_path / "run")["code"] == 75


def test_nothing_is_written_where_nothing_was(tmp_path: Path) -> None:
    """Catches a refused start that makes a directory, or marks one in which a live job has taken the old file away."""
    values = settings(tmp_path)
    assert start(tmp_path, values) == 2 and not (tmp_path / "run").exists()
    earlier(tmp_path)
    (tmp_path / "run" / "exit.json").unlink()
    assert start(tmp_path, values) == 2 and not (tmp_path / "run" / "exit.json").exists()
    (tmp_path / "run" / "config.yaml").write_text("cut: [")
    (tmp_path / "run" / "exit.json").write_text("{}")
    assert of_this_run(build_config(values), tmp_path / "run"), "a damaged config.yaml must not hide a refusal from scripts"


def test_a_disk_that_fails_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, and a code 2 that says "nothing was written", for a disk that fails under a run."""
    from megascale.train.trainer import Trainer

    make_tokens(tmp_path / "tokens")
    real = Trainer.train_step

    def failing(self: Trainer, step: int, batches: Any) -> Any:
        if step == 3:
            raise OSError(errno.EIO, "Input/output error", "tokens.bin")
        return real(self, step, batches)

    monkeypatch.setattr(Trainer, "train_step", failing)
    assert start(tmp_path, settings(tmp_path, checkpoint__every=2, checkpoint__asynchronous=False)) == 3
    found = told(tmp_path / "run")
    assert (found["code"], found["step"]) == (3, 2)
    assert "tokens.bin: Input/output error" in found["reason"] and "last good checkpoint is step 2" in found["reason"]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            RuntimeError("[pair.cc:547] Read error [10.0.0.2]:4: Connection reset by peer GLHF!"),
            5,
            "step 4 could not be written: a peer is",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), 4, "you tried to allocate 8 bytes"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 3, "step 4 could not be written: x: No space left"),
    ],
)
def test_what_a_failed_last_save_comes_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str) -> None:
    """Catches a node lost in the last save that scripts take for a training that cannot go on, and a watch that is not asked."""
    from megascale.checkpoint import saver
    from megascale.train.faults.watchdog import Watchdog

    make_tokens(tmp_path / "tokens")
    real, asked = saver.write_checkpoint, []

    def failing(root: Path, step: int, *args: Any, **more: Any) -> Path:
        if step == 4:
            raise error
        return real(root, step, *args, **more)

    def explain(self: Watchdog, error: BaseException, reason: str) -> str:
        asked.append(reason)
        return reason

    monkeypatch.setattr(saver, "write_checkpoint", failing)
    monkeypatch.setattr(Watchdog, "explain", explain)
    assert start(tmp_path, settings(tmp_path, checkpoint__every=2, train__steps=4, model__num_layers=1)) == code
    found = told(tmp_path / "run")
    assert found["code"] == code and words in found["reason"] and "last good one is step 2" in found["reason"]
    assert "GLHF" not in found["reason"] and len(asked) == (code == 5)
