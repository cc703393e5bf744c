"""One job per run directory: `run.lock` names the holder, and changes as long as it lives.

It works on disks that many nodes share: a hard link gives the file its name, which only one of two jobs can win, so no kernel lock is
needed. A holder on this node is looked up by its process. A holder elsewhere is watched, since the clocks of two nodes may differ: it
touches its file every `BEAT` seconds, and a file unchanged for `STALE` seconds belongs to nobody.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

from megascale.errors import UsageError
from megascale.files import discard
from megascale.launch.ranks import node_name

LOCK = "run.lock"
BEAT = 2.0  # seconds between two signs of life
STALE = 30.0  # seconds without one after which a holder on another node is gone
LOOK = 0.5  # seconds between two checks of another job's lock
SCHEDULERS = {"SLURM_JOB_ID": "squeue -j", "PBS_JOBID": "qstat", "LSB_JOBID": "bjobs"}  # variable with its id → command that shows the job


@dataclass(frozen=True)
class Holder:
    """The holder of a run directory. `machine` and `started` distinguish processes with the same pid."""

    node: str
    pid: int
    since: str
    token: str  # unique
    job: str = ""
    look: str = ""  # a command that shows the holder
    machine: str = ""
    started: str = ""

    @property
    def words(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.node}{job}, since {self.since}"


def this_process() -> Holder:
    known = [(os.environ[name], show) for name, show in SCHEDULERS.items() if os.environ.get(name)]
    job, look = (known[0][0], " ".join(known[0][::-1])) if known else ("", f"ssh {node_name()} ps -fp {os.getpid()}")
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return Holder(node_name(), os.getpid(), since, uuid.uuid4().hex, job, look, machine(), started(os.getpid()) or "")


def machine() -> str:
    """Identifies this boot of this machine and the pid namespace, since containers have their own."""
    parts = [platform.node()]
    for path, read in (("/proc/sys/kernel/random/boot_id", Path.read_text), ("/proc/self/ns/pid", os.readlink)):
        with suppress(OSError):
            parts.append(str(read(Path(path))).strip())
    return " ".join(parts)


def started(pid: int) -> str | None:
    """When a process began, on the machine's monotonic clock, which nobody can set; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else fields[19]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError):
        pass
    try:
        return f"{psutil.Process(pid).create_time():.0f}"
    except psutil.Error:
        return None


class RunLock:
    """The lock of a run directory. `take` it, and `release` it; between the two a thread keeps it fresh.

    lost  called from that thread with a sentence once another job holds the directory: this one must stop writing
    """

    def __init__(self, run_dir: Path, lost: Callable[[str], None]) -> None:
        self.run_dir, self.path, self.lost = run_dir, run_dir / LOCK, lost
        self.own = this_process()
        self.note: str | None = None  # what was in the way when it was taken
        self._made: list[Path] = []
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Raises UsageError if another job holds the directory or it cannot be written; then this job leaves nothing behind.

        say  called with the reason if it takes long
        """
        try:
            self._make_folder()
            self._take(say)
        except OSError as error:
            self._remove_folder()
            raise UsageError(
                f"the run directory {self.run_dir} cannot be written ({error.strerror or error}): make room there, or choose another "
                "run.dir"
            ) from None
        except UsageError:
            self._remove_folder()
            raise
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Called at any end of the run; also removes a directory that was created for the lock and holds nothing else."""
        self._released.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):
            if self.holds():
                self.path.unlink()
        self._remove_folder()

    def holds(self) -> bool:
        """Whether this job still holds the lock. Raises OSError if the disk does not answer."""
        found = self._read()
        return found is not None and found[0] is not None and found[0].token == self.own.token

    def check(self) -> None:
        """Raises UsageError if this job no longer owns the directory. Called before anything is written there."""
        try:
            if self.holds():
                return
            if not self.run_dir.is_dir():
                raise UsageError(
                    f"the run directory {self.run_dir} no longer exists: it was moved or deleted while the run wrote to it; move it back"
                )
            self.refresh()
            if not self.holds():
                raise UsageError(f"another job has taken over the run directory {self.run_dir}: {self._holder_words()}")
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read ({error.strerror or error}): check the disk of run.dir") from None

    def refresh(self) -> None:
        """Touches the file, and creates it again if somebody has deleted it."""
        with suppress(OSError):  # the disk may answer again later
            found = self._read()
            if found is None and self.run_dir.is_dir():
                self._link(self.path)
            elif found is not None and found[0] is not None and found[0].token != self.own.token:
                if not self._released.is_set():
                    self.lost(
                        f"another job has taken over the run directory {self.run_dir} ({found[0].words}), since this one gave no sign of "
                        f"life for {STALE:.0f} s; it stops writing"
                    )
            elif found is not None:
                os.utime(self.path)

    def _keep(self) -> None:
        while not self._released.wait(BEAT):
            self.refresh()

    def _take(self, say: Callable[[str], None]) -> None:
        told = False
        while not self._link(self.path):
            found = self._read()
            if found is None:
                continue  # released just now
            holder, mark = found
            if self._here(holder):
                assert holder is not None
                if started(holder.pid) == holder.started:
                    raise UsageError(self._refusal(holder))
                self.note = f"{LOCK} was left by {holder.words}, which is gone"
            else:
                if not told:
                    words = "somebody" if holder is None else holder.words
                    say(f"{self.path} is held by {words}; waiting up to {STALE:.0f} s for a sign of life")
                    told = True
                if self._alive(mark):
                    found = self._read()
                    raise UsageError(self._refusal(holder if found is None else found[0]))
                self.note = f"{LOCK} was left by {'somebody' if holder is None else holder.words}, without a heartbeat for {STALE:.0f} s"
            if self._succeed(holder, mark):
                return

    def _succeed(self, holder: Holder | None, mark: Any) -> bool:
        """Replaces a holder that is gone. Only one of several processes may: it holds a second file while it checks once more."""
        turn = self.path.with_name(f".{LOCK}.after-{'unknown' if holder is None else holder.token[:32]}")
        if not self._link(turn):
            other = self._read(turn)
            if other is None or self._alive(other[1], turn):
                return False  # another process has its turn: check again afterwards
            discard(turn)  # it was killed in the middle
            return False
        try:
            if self._read() != (holder, mark):
                return False
            mine = self._write_own()
            os.replace(mine, self.path)
        finally:
            discard(turn)
        time.sleep(LOOK)
        return self.holds()

    def _alive(self, mark: Any, path: Path | None = None) -> bool:
        """Whether the file changes within a holder's time for a sign of life; False if it stays the same or disappears."""
        watched, before = 0.0, time.monotonic()
        while watched < STALE:
            time.sleep(LOOK)
            found = self._read(path)
            now = time.monotonic()
            watched, before = watched + min(now - before, 2 * LOOK), now  # a frozen disk was frozen for the holder too
            if found is None:
                return False
            if found[1] != mark:
                return True
        return False

    def _here(self, holder: Holder | None) -> bool:
        """Whether the holder's process can be looked up: it is on this machine, or on an earlier boot of it."""
        if holder is None or not holder.machine:
            return False
        then, now = holder.machine.split(), machine().split()
        if then == now:
            return True
        return len(then) == len(now) == 3 and then[0] == now[0] and then[1] != now[1] and holder.node == node_name()

    def _refusal(self, holder: Holder | None) -> str:
        if holder is None:
            return f"the run directory {self.run_dir} is held by another job, whose {LOCK} changes: wait for it, or choose another run.name"
        age = ""
        with suppress(OSError):
            age = f", its last sign of life {max(0.0, time.time() - self.path.stat().st_mtime):.0f} s ago"
        return (
            f"the run directory {self.run_dir} is held by another job: {holder.words}{age}. Look at it with `{holder.look}`, wait for its "
            f"end or end it with `touch {self.run_dir / 'STOP'}`, or choose another run.name; only where that process is gone for sure, "
            f"delete {self.path}"
        )

    def _holder_words(self) -> str:
        found = self._read()
        return "somebody" if found is None or found[0] is None else found[0].words

    def _read(self, path: Path | None = None) -> tuple[Holder | None, Any] | None:
        """(holder, a mark that changes with every sign of life); holder is None if the file does not name one. None: no file."""
        try:
            with (path or self.path).open("rb") as file:  # opening makes NFS ask the server
                raw, stat = file.read(4096), os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        mark = (stat.st_mtime_ns, stat.st_ino, len(raw))
        try:
            said = json.loads(raw)
            # The fields are printed on terminals, so keep only printable characters.
            texts = {f.name: "".join(c for c in str(said[f.name]) if c.isprintable()) for f in fields(Holder) if f.name != "pid"}
            holder = Holder(pid=int(said["pid"]), **texts)
        except (ValueError, TypeError, KeyError, RecursionError):
            return None, mark
        return holder, mark

    def _write_own(self) -> Path:
        mine = self.path.with_name(f".{LOCK}.{self.own.token[:12]}.{os.getpid()}.tmp")
        try:
            mine.write_text(json.dumps(asdict(self.own)) + "\n", encoding="utf-8")
        except OSError:
            discard(mine)
            raise
        return mine

    def _link(self, path: Path) -> bool:
        """Creates `path` with this process as the holder, if the name is free. Raises OSError."""
        mine = self._write_own()
        try:
            os.link(mine, path)
        except FileExistsError:
            return self._read(path) == self._read(mine)  # the answer to a successful link may get lost
        except OSError:
            return self._create(path)
        finally:
            discard(mine)
        return True

    def _create(self, path: Path) -> bool:
        """The same on a disk without hard links."""
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self.own)) + "\n")
        return True

    def _make_folder(self) -> None:
        missing = [p for p in (self.run_dir, *self.run_dir.parents) if not p.exists()]
        self._made = missing
        self.run_dir.mkdir(parents=True, exist_ok=True)

    def _remove_folder(self) -> None:
        for folder in self._made:
            with suppress(OSError):  # normally it contains a run by now
                folder.rmdir()
