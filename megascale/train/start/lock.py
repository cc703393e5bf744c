"""One job a run directory: `run.lock` names who holds it, and changes as long as the holder lives.

Made for disks that many nodes share: the file gets its name by a hard link, which one of two can win, and no lock of the kernel is needed.
A holder on this node is looked up by its process; one elsewhere is watched, since two nodes' clocks need not agree: its file is touched
every `BEAT` seconds, and one that stays as it is for `STALE` seconds belongs to nobody.
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
LOOK = 0.5  # seconds between two looks at another's lock
SCHEDULERS = {"SLURM_JOB_ID": "squeue -j", "PBS_JOBID": "qstat", "LSB_JOBID": "bjobs"}  # whose number it is → what shows that job


@dataclass(frozen=True)
class Holder:
    """Who holds a run directory. `machine` and `started` tell a process from another one with the same number."""

    node: str
    pid: int
    since: str
    token: str  # no two are the same
    job: str = ""
    look: str = ""  # a command that shows it
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
    """This start of this machine, and whose process numbers these are: containers count their own."""
    parts = [platform.node()]
    for path, read in (("/proc/sys/kernel/random/boot_id", Path.read_text), ("/proc/self/ns/pid", os.readlink)):
        with suppress(OSError):
            parts.append(str(read(Path(path))).strip())
    return " ".join(parts)


def started(pid: int) -> str | None:
    """When a process began, in its machine's own count, which no clock that is set moves; None where there is none."""
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

    lost  called from that thread with a sentence where another job holds the directory now: this one must write no more
    """

    def __init__(self, run_dir: Path, lost: Callable[[str], None]) -> None:
        self.run_dir, self.path, self.lost = run_dir, run_dir / LOCK, lost
        self.own = this_process()
        self.note: str | None = None  # what was in the way when it was taken
        self._made: list[Path] = []
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Raises UsageError where another job holds the directory, or it cannot be written; then nothing is left of this one.

        say  is told why it takes long
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
        """At the end, however it comes; a directory that was made for the lock and holds nothing else goes too."""
        self._released.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):
            if self.holds():
                self.path.unlink()
        self._remove_folder()

    def holds(self) -> bool:
        """Raises OSError where the disk does not say."""
        found = self._read()
        return found is not None and found[0] is not None and found[0].token == self.own.token

    def check(self) -> None:
        """Raises UsageError where the directory is no longer this run's: before anything is written there."""
        try:
            if self.holds():
                return
            if not self.run_dir.is_dir():
                raise UsageError(
                    f"the run directory {self.run_dir} is not there any more: it was moved or deleted while the run wrote to it; "
                    "move it back"
                )
            self.refresh()
            if not self.holds():
                raise UsageError(f"another job has taken the run directory {self.run_dir} over: {self._holder_words()}")
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read ({error.strerror or error}): look at the disk of run.dir") from None

    def refresh(self) -> None:
        """A sign of life; and where somebody has deleted the file, it is made again."""
        with suppress(OSError):  # a disk that does not answer now may do so later
            found = self._read()
            if found is None and self.run_dir.is_dir():
                self._link(self.path)
            elif found is not None and found[0] is not None and found[0].token != self.own.token:
                if not self._released.is_set():
                    self.lost(
                        f"another job has taken the run directory {self.run_dir} over ({found[0].words}), since this one gave no sign of "
                        f"life for {STALE:.0f} s; it writes no more"
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
        """Puts this process in the place of one that is gone. Of several only one may: it holds a second file while it looks once more."""
        turn = self.path.with_name(f".{LOCK}.after-{'unknown' if holder is None else holder.token[:32]}")
        if not self._link(turn):
            other = self._read(turn)
            if other is None or self._alive(other[1], turn):
                return False  # another has its turn: look again at what it makes of it
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
        """Whether the file changes within the time that a holder has for a sign of life, or goes."""
        watched, before = 0.0, time.monotonic()
        while watched < STALE:
            time.sleep(LOOK)
            found = self._read(path)
            now = time.monotonic()
            watched, before = watched + min(now - before, 2 * LOOK), now  # a disk that stood still did so for the holder too
            if found is None:
                return False
            if found[1] != mark:
                return True
        return False

    def _here(self, holder: Holder | None) -> bool:
        """Whether the holder's process can be looked up: it is of this machine, or of an earlier start of it."""
        if holder is None or not holder.machine:
            return False
        then, now = holder.machine.split(), machine().split()
        if then == now:
            return True
        return len(then) == len(now) == 3 and then[0] == now[0] and then[1] != now[1] and holder.node == node_name()

    def _refusal(self, holder: Holder | None) -> str:
        if holder is None:
            return (
                f"the run directory {self.run_dir} is held by another job, whose {LOCK} changes: wait for its end, or take another run.name"
            )
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
        """(who, a mark that changes with every sign of life); who is None for a file that does not say. None: there is no file."""
        try:
            with (path or self.path).open("rb") as file:  # opening makes NFS ask the server
                raw, stat = file.read(4096), os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        mark = (stat.st_mtime_ns, stat.st_ino, len(raw))
        try:
            said = json.loads(raw)
            # They are shown on terminals: nothing but what can be read.
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
        """Gives this process's words the name `path`, where that is free. Raises OSError."""
        mine = self._write_own()
        try:
            os.link(mine, path)
        except FileExistsError:
            return self._read(path) == self._read(mine)  # the answer to a link that was made may get lost on its way
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
            with suppress(OSError):  # it holds a run by now, which is the rule
                folder.rmdir()
