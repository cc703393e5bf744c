"""The files of a preparation: one process writes a prefix at a time, and they appear together or not at all."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megascale.errors import UsageError
from megascale.files import discard, sync_folder

QUIET = 3600.0  # seconds after which the lock of a process on another machine, which cannot be asked, counts as left behind
UNSAID = 10.0  # seconds after which a lock that says nothing does: its process was killed, or its disk full, as it wrote it
BEAT = 5.0  # seconds between signs of life


class Publication:
    """Files that are written under other names and then appear together, indexes last."""

    def __init__(self) -> None:
        self._staged: dict[Path, Path] = {}
        self._stale: list[Path] = []

    def stage(self, final: Path) -> Path:
        """Where to write what will be `final`."""
        self._staged[final] = final.with_name(f".{final.name}.partial")
        return self._staged[final]

    def remove(self, final: Path) -> None:
        """What must not lie beside the new files."""
        self._stale.append(final)

    def publish(self) -> None:
        """Raises OSError; then none of the new files is there."""
        finals = sorted(self._staged, key=lambda path: path.suffix == ".idx")
        # Old indexes and facts go first: whoever is killed in here leaves nothing that reads as whole, and never an old file beside a new.
        hidden = [f for f in reversed(finals) if f.suffix == ".idx" or (f.suffix == ".json" and not f.name.endswith(".tokenizer.json"))]
        done: list[Path] = []
        try:
            for final in (*hidden, *self._stale):
                final.unlink(missing_ok=True)
            for final in finals:
                os.replace(self._staged[final], final)
                done.append(final)
            for folder in {f.parent for f in finals}:
                with suppress(OSError):  # not every file system has it
                    sync_folder(folder)
        except BaseException:
            for final in done:
                discard(final)
            raise

    def discard(self) -> None:
        """Deletes what was not published."""
        for partial in self._staged.values():
            discard(partial)


@contextmanager
def publication() -> Iterator[Publication]:
    """Publishes at the end; nothing is left of what failed before."""
    files = Publication()
    try:
        yield files
        files.publish()
    finally:
        files.discard()


class Claim:
    """A prefix that this process alone writes."""

    def __init__(self, lock: Path) -> None:
        self._lock, self._told = lock, time.monotonic()

    def alive(self) -> None:
        """To be called now and then. Raises UsageError where another process took over."""
        if time.monotonic() - self._told >= BEAT:
            self._told = time.monotonic()
            try:
                os.utime(self._lock)
            except OSError as error:
                raise UsageError(f"{self._lock} has gone ({error.strerror}): another process may write there; run it again") from None


@contextmanager
def claim(prefix: str, endings: tuple[str, ...]) -> Iterator[Claim]:
    """Makes the prefix this process's own, with its folder, and clears away what a killed process left of files with these `endings`.

    Raises UsageError where another process holds it, naming it, or the folder cannot be written. A lock whose process has ended is broken.
    """
    path = Path(prefix)
    lock = path.with_name(f".{path.name}.lock")
    made = [f for f in (path.parent, *path.parent.parents) if not f.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _take(lock, prefix)
    except OSError as error:
        _unmake(made)
        raise UsageError(f"{prefix} cannot be written ({error}): choose another --out, or make room there") from None
    try:
        for ending in endings:
            discard(path.with_name(f".{path.name}{ending}.partial"))
        yield Claim(lock)
    except BaseException:
        discard(lock)
        _unmake(made)
        raise
    discard(lock)


def _unmake(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _take(lock: Path, prefix: str) -> None:
    for _ in range(5):
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            owner = _owner(lock)
            if not _ended(owner, lock):
                who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
                raise UsageError(
                    f"{who} has been writing {prefix} since {owner.get('since', '?')}: wait for it, or choose another --out; if it is "
                    f"gone, delete {lock}"
                ) from None
            _break(lock, owner)
            continue
        try:
            with open(handle, "wb") as file:
                file.write(json.dumps(_self()).encode())
        except OSError:
            discard(lock)  # it would keep this prefix from everybody, and not say for whom
            raise
        return
    raise OSError(f"{lock} is taken and given up again and again")


def _break(lock: Path, owner: dict[str, Any]) -> None:
    """Takes an ended process's lock away; if another process did so meanwhile and holds it now, that one keeps it."""
    aside = lock.with_name(f"{lock.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        os.rename(lock, aside)
        if _owner(aside) != owner:
            with suppress(OSError):
                os.link(aside, lock)
        discard(aside)


def _owner(lock: Path) -> dict[str, Any]:
    """What the lock says; empty for one that says nothing usable."""
    try:
        found = json.loads(lock.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _ended(owner: dict[str, Any], lock: Path) -> bool:
    """Whether the lock was left behind: its process on this machine has ended, nobody touched it for an hour, or it says nothing for longer
    than its writing takes. One that this user may not read says something.
    """
    try:
        quiet = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return True
    if not owner and os.access(lock, os.R_OK):
        return quiet > UNSAID
    me, pid = _self(), owner.get("pid")
    if not isinstance(pid, int) or any(owner.get(k) != me[k] for k in ("host", "processes")):
        return quiet > QUIET
    return owner.get("began") != _began(pid)


def _self() -> dict[str, Any]:
    """This process, so that it is told from every other one: a number is given again, and containers count on their own."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "processes": processes, "pid": pid, "began": _began(pid), "since": since}


def _began(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's own count; None where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (OSError, OverflowError):
        pass
    return "running"
