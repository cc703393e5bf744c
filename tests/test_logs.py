"""The logs of a run: damaged ones are mended and never stop a resume, full disks never stop a run, nothing is lost in silence."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megascale.errors import UsageError
from megascale.rows import metric_mistake, read_lines
from megascale.train.log import run_log
from megascale.train.log.past import past_of
from megascale.train.log.run_log import RunLog


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((x.encode() if isinstance(x, str) else x) for x in lines))
    return path


def row(step: int) -> str:
    return json.dumps({"step": step, "time": 1000.0 + step, "loss": 2.0}) + "\n"


def steps_in(path: Path) -> list[int]:
    return [line.row["step"] for line in read_lines(path, metric_mistake) if line.row is not None]


DAMAGE: dict[str, str | bytes] = {
    "a byte": b"\xff\n",
    "a flipped bit": b'{"step": 2, "lo\xf3s": 2.0\n',
    "a step that is a word": '{"step": "x", "time": 1}\n',
    "a loss that is a word": '{"step": 2, "loss": "low"}\n',
    "no object": "[1]\n",
    "nested": "[" * 100_000 + "\n",
    "zeros of a crashed file system": b"\x00" * 512 + b"\n",
    "a step twice": row(1),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_lines_are_set_aside(tmp_path: Path, kind: str) -> None:
    """Catches a wrong byte that stops every resume, and damage that is destroyed or dropped in silence."""
    write(tmp_path / "metrics.jsonl", row(1), DAMAGE[kind], row(2), row(3), '{"step": 4, "lo')
    write(tmp_path / "events.jsonl", '{"step": 0, "event": "start"}\n', b"\xff\xfe\n")
    write(tmp_path / "heartbeat.json", b"\xff\x00[")
    log = RunLog(tmp_path, 2)
    log.metrics({"step": 3})
    log.event("stop", 3)
    log.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == write(tmp_path / "x", DAMAGE[kind]).read_bytes()
    assert (tmp_path / "events.jsonl.damaged").read_bytes() == b"\xff\xfe\n"
    assert len(log.notes) == 2 and "metrics.jsonl.damaged" in log.notes[0] and "events.jsonl.damaged" in log.notes[1]
    assert log.past == {"last_seen": 1003.0, "lost_steps": 1}
    assert not list(tmp_path.glob(".*"))


def test_more_damage_is_added(tmp_path: Path) -> None:
    """Catches damage of today that overwrites that of yesterday."""
    for number in range(2):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(f"bad {number}\n" + row(number + 1))
        RunLog(tmp_path, number + 1).close()
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == "bad 0\nbad 1\n" and steps_in(tmp_path / "metrics.jsonl") == [1, 2]


def test_a_file_in_order_is_not_rewritten(tmp_path: Path) -> None:
    """Catches a resume that needs room for a second copy of logs in which nothing is to be mended."""
    before = write(tmp_path / "metrics.jsonl", row(1), row(2)).stat().st_ino
    log = RunLog(tmp_path, 2)
    log.close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before and log.notes == []


def test_rows_are_kept_where_a_run_begins_again(tmp_path: Path) -> None:
    """Catches a start at step 1 that erases the curve which stood there."""
    for attempt in range(2):
        write(tmp_path / "metrics.jsonl", row(1), row(2 + attempt))
        log = RunLog(tmp_path, 0)
        log.close()
        assert len(log.notes) == 1 and f"are kept in {tmp_path / 'metrics.jsonl.before'}" in log.notes[0]
    assert steps_in(tmp_path / "metrics.jsonl") == []
    assert steps_in(tmp_path / "metrics.jsonl.before") == [1, 2] and steps_in(tmp_path / "metrics.jsonl.before-2") == [1, 3]


def test_a_log_that_is_a_link_stays_one(tmp_path: Path) -> None:
    """Catches a link to another disk that a resume replaces by a file, so that whoever reads there sees no more rows."""
    (tmp_path / "disk").mkdir()
    target = write(tmp_path / "disk" / "rows", row(1), b"\xff\n", row(2), row(3))
    (tmp_path / "metrics.jsonl").symlink_to("disk/rows")
    log = RunLog(tmp_path, 2)
    log.metrics({"step": 3})
    log.close()
    assert (tmp_path / "metrics.jsonl").is_symlink() and steps_in(target) == [1, 2, 3]
    assert str(target) + ".damaged" in log.notes[0] and (tmp_path / "disk" / "rows.damaged").read_bytes() == b"\xff\n"
    RunLog(tmp_path, 0).close()
    assert (tmp_path / "metrics.jsonl").is_symlink() and steps_in(target) == [] and steps_in(tmp_path / "disk" / "rows.before") == [1, 2, 3]


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
@pytest.mark.parametrize("kind", ["folder", "dangling link", "loop", "pipe"])
def test_names_held_by_no_file(tmp_path: Path, name: str, kind: str) -> None:
    """Catches a traceback, or a wait for ever in a pipe, where something else has the name of a log."""
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
        (path / "thesis.tex").touch()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if kind == "loop" else "nowhere")
    log = RunLog(tmp_path, 2)
    log.metrics({"step": 3})
    log.event("x", 3)
    log.close()
    assert path.is_file() and os.path.lexists(tmp_path / f"{name}.set-aside") and f"{name}.set-aside" in log.notes[0]
    assert kind != "folder" or (tmp_path / f"{name}.set-aside" / "thesis.tex").exists()


def test_a_log_that_may_not_be_read(tmp_path: Path) -> None:
    """Catches a traceback for a file of another user."""
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    write(tmp_path / "metrics.jsonl", row(1)).chmod(0)
    with pytest.raises(UsageError, match=r"metrics\.jsonl may not be read and written: check the permissions"):
        RunLog(tmp_path, 1)


class FullDisk:
    """Stands in for `os.write`: takes a number of bytes, then the disk is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: float = float("inf")
        self.real = os.write
        monkeypatch.setattr(run_log.os, "write", self.write)

    def write(self, file: int, data: bytes) -> int:
        if self.room < 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = int(min(self.room, len(data)))
        self.room -= taken
        return self.real(file, data[:taken])


def test_a_full_disk_keeps_rows_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that dies of its log, half rows, rows that are lost though there was room later, and warnings at every step."""
    disk, said = FullDisk(monkeypatch), list[str]()
    log = RunLog(tmp_path, 0, said.append)
    log.metrics({"step": 1})
    disk.room = 7
    for step in (2, 3):
        log.metrics({"step": step})
        log.event("skip", step)
    assert len(said) == 2 and all("No space left" in s and "training continues" in s for s in said)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n', "half a row is no row"
    disk.room = float("inf")
    log.metrics({"step": 4})
    log.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in events] == [("skip", 2), ("skip", 3), ("late_rows", 4), ("late_rows", 4)]
    assert {(e["file"], e["late"], e["lost"]) for e in events[2:]} == {("metrics.jsonl", 2, 0), ("events.jsonl", 2, 0)}


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that grows for as long as a disk is full, and rows that are lost uncounted."""
    monkeypatch.setattr(run_log, "KEPT", 3)
    disk, said = FullDisk(monkeypatch), list[str]()
    log = RunLog(tmp_path, 0, said.append)
    disk.room = 0
    for step in range(1, 7):
        log.metrics({"step": step})
    disk.room = float("inf")
    log.metrics({"step": 7})
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert (event["late"], event["lost"]) == (6, 3) and steps_in(tmp_path / "metrics.jsonl") == [4, 5, 6, 7]
    disk.room = 0
    log.metrics({"step": 8})
    log.close()
    assert "1 rows of" in said[-1] and "never written" in said[-1]


def test_a_start_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, and temporaries that a failed start leaves on a disk that is full already."""
    write(tmp_path / "metrics.jsonl", row(1), row(2))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megascale.train.log.past.os.replace", full)
    with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\): make room"):
        RunLog(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"] and steps_in(tmp_path / "metrics.jsonl") == [1, 2]


def test_an_outside_logger_that_fails(tmp_path: Path) -> None:
    """Catches a run that dies of a server far away, or warns at every step."""
    said: list[str] = []
    log = RunLog(tmp_path, 0, said.append)

    def broken(_: Any) -> None:
        raise ConnectionError("no route")

    log._sinks["W"] = broken
    log._closers.append(lambda: broken(None))
    for step in (1, 2):
        log.metrics({"step": step})
    log.close()
    assert len(said) == 1 and "no route" in said[0] and steps_in(tmp_path / "metrics.jsonl") == [1, 2]


def test_times_that_are_none(tmp_path: Path) -> None:
    """Catches an account of time that a row of a broken clock decides."""
    write(tmp_path / "metrics.jsonl", '{"step": 1, "time": NaN}\n{"step": 2, "time": 1e308}\n{"step": 3, "time": "x"}\n', row(4))
    assert past_of(tmp_path, 4) == {"last_seen": 1004.0, "lost_steps": 0}
