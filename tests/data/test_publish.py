"""Files of a preparation appear together or not at all, whatever happens; and no process of it outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import typer

from megascale.commands import prepare as prepare_data
from megascale.data.prepare import prepare, prepare_pairs
from megascale.data.publish import QUIET, UNSAID, Publication, _self, claim
from megascale.data.tokenizer import load_tokenizer
from megascale.data.walk import OUTPUTS
from megascale.data.workers import usable_cores
from megascale.errors import UsageError
from tests.disk import small_files

PLAIN = Path(__file__).parent / "inputs" / "plain.json"


def run(*args: object) -> None:
    """tools/prepare_data.py in this process."""
    typer.main.get_command(prepare_data.app).main([*map(str, args), "--tokenizer", str(PLAIN), "--workers", "1"], standalone_mode=False)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("limit", [100, 4096, 30_000])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, limit: int, overwrite: bool) -> None:
    """Catches facts and a tokenizer without their tokens, hidden rests that fill the disk, and old tokens beside new facts, wherever the
    disk becomes full: at the tokens, at the index, at a small file.
    """
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "a"}\n' * 6000)
    if overwrite:
        (tmp_path / "in" / "b.txt").write_text("old text")
        run(tmp_path / "in" / "b.txt", "--out", tmp_path / "out" / "p")
    before = content(tmp_path / "out")
    with small_files(limit), pytest.raises(UsageError, match=r"cannot be written .*File too large"):
        run(tmp_path / "in" / "a.jsonl", "--out", tmp_path / "out" / "p", "--overwrite")
    assert content(tmp_path / "out") == before


def test_pairs_appear_together(tmp_path: Path) -> None:
    """Catches sources without targets where the second side fails."""
    (tmp_path / "a.jsonl").write_text('{"source": "a", "target": "b"}\n{"source": "c", "target": 3}\n')
    tokenizer = load_tokenizer(PLAIN)
    with pytest.raises(UsageError, match="'target' is a int"):
        prepare_pairs([tmp_path / "a.jsonl"], str(tmp_path / "p"), (tokenizer, tokenizer), ("source", "target"), 1, lambda done: None)
    assert list(content(tmp_path)) == ["a.jsonl"]


def test_an_interrupted_publication_is_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an order of renames that has an index beside tokens or facts that are not its own, at any moment at which one may be killed;
    and new files that stay where a later one fails.
    """
    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_text("old")
    new.write_text("something new")
    run(old, "--out", tmp_path / "p")
    names = [f"p{end}" for end in OUTPUTS if (tmp_path / f"p{end}").exists()]
    states: list[dict[str, bytes]] = []
    replace, unlink = os.replace, Path.unlink

    def seen() -> None:
        states.append({n: c for n, c in content(tmp_path).items() if n in names})

    monkeypatch.setattr(os, "replace", lambda a, b: (seen(), replace(a, b), seen()))
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: (seen(), unlink(self, missing_ok=missing_ok), seen()))
    run(new, "--out", tmp_path / "p", "--overwrite")
    monkeypatch.undo()
    first, last = states[0], {n: c for n, c in content(tmp_path).items() if n in names}
    for state in states:
        for watched in (("p.idx", "p.bin"), ("p.json", "p.bin"), ("p.json", "p.idx")):
            if set(watched) <= set(state):
                assert [state[n] for n in watched] in ([first[n] for n in watched], [last[n] for n in watched])
    files = Publication()
    for name in ("x.bin", "x.json", "x.idx"):
        files.stage(tmp_path / name).write_text(name)
    files.stage(tmp_path / "x.idx").unlink()
    with pytest.raises(OSError):
        files.publish()
    files.discard()
    assert not list(tmp_path.glob("x*")) and not list(tmp_path.glob(".x*"))


def owner(**changed: object) -> str:
    return json.dumps({**_self(), **changed})


@pytest.mark.parametrize(
    ("lock", "age", "held"),
    [
        (lambda: owner(), 0, True),
        (lambda: owner(began="1"), 0, False),  # the number belongs to another process by now
        (lambda: owner(pid=2**30), 0, False),
        (lambda: owner(host="elsewhere"), 0, True),
        (lambda: owner(host="elsewhere"), QUIET + 60, False),
        (lambda: owner(processes="another container"), 0, True),
        (lambda: "", 0, True),
        (lambda: "", UNSAID + 5, False),  # of a full disk
        (lambda: '{"host": "e', UNSAID + 5, False),
        (lambda: "[" * 99999, QUIET + 60, False),
    ],
)
def test_locks_that_were_left_behind_are_broken(tmp_path: Path, lock: Callable[[], str], age: float, held: bool) -> None:
    """Catches two writers of one prefix, and a prefix that nobody can write any more since a process was killed."""
    path = tmp_path / ".p.lock"
    path.write_text(lock())
    os.utime(path, (time.time() - age,) * 2)
    (tmp_path / ".p.bin.partial").write_text("rest")
    if held:
        with pytest.raises(UsageError, match=r"has been writing .*p since .*delete .*\.p\.lock"), claim(str(tmp_path / "p"), OUTPUTS):
            pass
        assert len(content(tmp_path)) == 2
    else:
        with claim(str(tmp_path / "p"), OUTPUTS):
            assert json.loads(path.read_text())["pid"] == os.getpid()
            assert list(content(tmp_path)) == [".p.lock"]
        assert content(tmp_path) == {}


def test_a_lock_that_a_full_disk_cuts_is_taken_away(tmp_path: Path) -> None:
    """Catches an empty lock that keeps its prefix from everybody for an hour."""
    with small_files(1), pytest.raises(UsageError, match=r"cannot be written.*make room"), claim(str(tmp_path / "p"), OUTPUTS):
        pass
    assert content(tmp_path) == {}


def test_a_claim_tells_that_it_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two writers after a lock was broken, and a folder that was made for nothing."""
    monkeypatch.setattr("megascale.data.publish.BEAT", 0.0)

    def lose() -> None:
        with claim(str(tmp_path / "new" / "folder" / "p"), OUTPUTS) as claimed:
            claimed.alive()
            (tmp_path / "new" / "folder" / ".p.lock").unlink()
            claimed.alive()

    with pytest.raises(UsageError, match="has gone"):
        lose()
    assert content(tmp_path) == {}


@contextmanager
def running(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A preparation of FOLDER/in.jsonl as FOLDER/p with two workers, which has written first tokens and goes on for long."""
    (folder / "in.jsonl").write_text((json.dumps({"text": "many words again and again\n" * 400}) + "\n") * 2000)
    command = [sys.executable, "tools/prepare_data.py", str(folder / "in.jsonl"), "--out", str(folder / "p"), "--tokenizer", str(PLAIN)]
    process = subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        partial, end = folder / ".p.bin.partial", time.monotonic() + 120
        while not (partial.exists() and partial.stat().st_size) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=60)[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux, which tells children of a killed parent")
def test_a_killed_worker_is_a_sentence_and_a_second_writer_is_refused(tmp_path: Path) -> None:
    """Catches a traceback for what the kernel does when memory is short, and two preparations that write over each other."""
    with running(tmp_path) as process:
        (tmp_path / "other.txt").write_text("other")
        with pytest.raises(UsageError, match=f"process {process.pid} on .* has been writing .*p since"):
            run(tmp_path / "other.txt", "--out", tmp_path / "p", "--overwrite")
        psutil.Process(process.pid).children()[0].kill()
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 2 and "one of 2 workers was killed" in said and "--workers" in said and "Traceback" not in said
    assert sorted(content(tmp_path)) == ["in.jsonl", "other.txt"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux, which tells children of a killed parent")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    """Catches workers that stay for ever, and rests on the disk: none after a request to end, and after a kill none that the next run does
    not clear away.
    """
    with running(tmp_path) as process:
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        process.send_signal(how)
        process.communicate(timeout=120)
        assert process.returncode == (143 if how == signal.SIGTERM else -how)
        assert gone(workers)
    if how == signal.SIGKILL:
        assert (tmp_path / ".p.lock").exists()
        (tmp_path / "b.txt").write_text("text")
        run(tmp_path / "b.txt", "--out", tmp_path / "p")
        assert sorted(content(tmp_path)) == ["b.txt", "in.jsonl", "p.bin", "p.idx", "p.json", "p.tokenizer.json"]
    else:
        assert list(content(tmp_path)) == ["in.jsonl"]


def test_workers_are_as_many_as_cores_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a worker for each core of the machine where one was allocated."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr("megascale.limits.MEMBERSHIP", tmp_path / "none")
    monkeypatch.setattr("megascale.limits.GROUPS", tmp_path)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert usable_cores() == 6
    for given, cores in (("4", 4), ("64", 6), ("0", 1), ("x", 6), ("9" * 50, 6)):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", given)
        assert usable_cores() == cores


def test_a_tokenizer_beside_the_output_survives(tmp_path: Path) -> None:
    """Catches the user's own tokenizer lost where it has the name of an output."""
    (tmp_path / "p.tokenizer.json").write_bytes(PLAIN.read_bytes())
    (tmp_path / "a.txt").write_text("text")
    prepare([tmp_path / "a.txt"], str(tmp_path / "p"), load_tokenizer(tmp_path / "p.tokenizer.json"), "text", 1, True, lambda done: None)
    assert (tmp_path / "p.tokenizer.json").read_bytes() == PLAIN.read_bytes() and (tmp_path / "p.idx").exists()
