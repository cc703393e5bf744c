"""Publishes the files of a preparation: one process at a time writes a prefix, and its files appear together or not at all."""

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

QUIET = 3600.0  # seconds after which the lock of a process on another machine counts as abandoned
UNSAID = 10.0  # seconds after which an empty lock counts as abandoned: its process was killed or the disk was full
BEAT = 5.0  # seconds between signs of life


class Publication:
    """Files written under temporary names that then appear together, indexes last."""

    def __init__(self) -> None:
        self._staged: dict[Path, Path] = {}
        self._stale: list[Path] = []

    def stage(self, final: Path) -> Path:
        """The temporary path for `final`."""
        self._staged[final] = final.with_name(f".{final.name}.partial")
        return self._staged[final]

    def remove(self, final: Path) -> None:
        """Registers an old file that must not remain next to the new ones."""
        self._stale.append(final)

    def publish(self) -> None:
        """Renames all files. Raises OSError; then none of the new files exists."""
        finals = sorted(self._staged, key=lambda path: path.suffix == ".idx")
        # Delete old indexes and facts first: a kill here leaves nothing that looks complete, and never mixes old and new files.
        hidden = [f for f in reversed(finals) if f.suffix == ".idx" or (f.suffix == ".json" and not f.name.endswith(".tokenizer.json"))]
        done: list[Path] = []
        try:
            for final in (*hidden, *self._stale):
                final.unlink(missing_ok=True)
            for final in finals:
                os.replace(self._staged[final], final)
                done.append(final)
            for folder in {f.parent for f in finals}:
                with suppress(OSError):  # not every file system supports it
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
    """Publishes at the end of the block; a failed block leaves nothing."""
    files = Publication()
    try:
        yield files
        files.publish()
    finally:
        files.discard()


class Claim:
    """The exclusive right of this process to write a prefix."""

    def __init__(self, lock: Path) -> None:
        self._lock, self._told = lock, time.monotonic()

    def alive(self) -> None:
        """Call it now and then. Raises UsageError if another process took over."""
        if time.monotonic() - self._told >= BEAT:
            self._told = time.monotonic()
            try:
                os.utime(self._lock)
            except OSError as error:
                raise UsageError(f"{self._lock} has gone ({error.strerror}): another process may write there; run it again") from None


@contextmanager
def claim(prefix: str, endings: tuple[str, ...]) -> Iterator[Claim]:
    """Claims the prefix for this process, creates its folder, and deletes leftovers of a killed process with these `endings`.

    Raises UsageError if another process, which is named, holds it, or the folder cannot be written. Breaks the lock of an ended process.
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
            discard(lock)  # an empty lock would block everybody without naming its owner
            raise
        return
    raise OSError(f"{lock} is taken and given up again and again")


def _break(lock: Path, owner: dict[str, Any]) -> None:
    """Removes an ended process's lock, unless another process has taken it meanwhile."""
    aside = lock.with_name(f"{lock.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        os.rename(lock, aside)
        if _owner(aside) != owner:
            with suppress(OSError):
                os.link(aside, lock)
        discard(aside)


def _owner(lock: Path) -> dict[str, Any]:
    """The content of the lock; empty if it is unusable."""
    try:
        found = json.loads(lock.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _ended(owner: dict[str, Any], lock: Path) -> bool:
    """Whether the lock is abandoned: its process on this machine has ended, nobody touched it for an hour, or it has been empty for longer
    than writing it takes. A lock that this user may not read is not empty.
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
    """Identifies this process uniquely: pids are reused, and containers have their own."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "processes": processes, "pid": pid, "began": _began(pid), "since": since}


def _began(pid: int) -> str | None:
    """When a process of this machine began, in kernel ticks; None if it has ended."""
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
