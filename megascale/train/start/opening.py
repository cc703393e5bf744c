"""Opens a run directory: locks it for this job, clears leftovers, and decides where the run continues."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from megascale.checkpoint.choose import confirm
from megascale.checkpoint.folders import LATEST, aside_in, named_as_steps, set_aside
from megascale.checkpoint.trainer import read_progress
from megascale.comm.agreement import Agreement
from megascale.config.identity import SOURCES, check_identity, identity, only_moved
from megascale.config.load import build_config, read_yaml, to_yaml
from megascale.config.saved import CONFIG, hint_of_newer, stamped
from megascale.config.schema import Config
from megascale.data.memory import TokenLists
from megascale.data.samples import prints_of
from megascale.errors import UsageError
from megascale.files import discard, write_atomic
from megascale.formats.export import FOLDER
from megascale.train.log.past import last_saved
from megascale.train.start.branch import Note, Wish, forget, go_back, remember, wish_of
from megascale.train.start.changes import changes_since
from megascale.train.start.lock import LOCK, STALE, RunLock

OWN_FILES = ("config.yaml", "metrics.jsonl", "events.jsonl", "checkpoints", LOCK)
STOP = "STOP"  # a file with this name asks a run to stop
BESIDE = ("exit.json", STOP, "launch", "heartbeat.json", "stacks")  # files that a job may leave before the run exists
# Files of ours that a kill left half written.
LEFT_OVER = re.compile(r"\.writable|\.(config\.yaml|metrics\.jsonl|events\.jsonl|heartbeat\.json|exit\.json|run\.lock)\..+")


@dataclass
class Opening:
    """A run directory that this job owns. `elsewhere`: the checkpoint of another run that this one begins from. Only the first rank has the
    rest: its lock, its notes, and whether config.yaml is damaged.
    """

    lock: RunLock | None
    elsewhere: Path | None = None
    notes: list[Note] = field(default_factory=list)
    damaged_config: str = ""

    def guard(self) -> None:
        """Raises UsageError if this job no longer owns the directory."""
        if self.lock is not None:
            self.lock.check()


@contextmanager
def open_run(config: Config, lists: TokenLists | None = None) -> Iterator[Opening]:
    """Collective. `config` is that of the whole run, `lists` its samples in memory, if any. Raises UsageError if another job holds the
    directory or it cannot be used; then nothing has been written.
    """
    team, run_dir = Agreement(), Path(config.run_dir)
    opening = Opening(None)
    try:
        wish = team.first(lambda: _take(config, run_dir, opening))
        if wish.folder is not None:
            confirm(wish.folder)
        if wish.kind == "back":
            team.first(lambda: opening.notes.append(_back(config, run_dir, wish, lists)))
        opening.elsewhere = wish.folder if wish.kind == "elsewhere" else None
        yield opening
    finally:
        if opening.lock is not None:
            opening.lock.release()


def _take(config: Config, run_dir: Path, opening: Opening) -> Wish:
    check_directory(run_dir)
    lock = RunLock(run_dir, _leave)
    lock.take(lambda text: print(text, file=sys.stderr, flush=True))
    opening.lock = lock
    if lock.note is not None:
        opening.notes.append(Note(lock.note, "lock_broken"))
    wish = wish_of(config.checkpoint.resume, run_dir)
    # After going back, a run is the checkpoint's, which is compared later; config.yaml may belong to another branch. If the run grows, only
    # config.yaml has all phases.
    judge = bool(config.grow) or (wish.kind != "back" and wish.note is None)
    opening.damaged_config = check_saved_config(config, run_dir, judge) or ""
    check_folders(config, run_dir)
    if wish.note is not None:
        opening.notes.append(wish.note)
    if config.checkpoint.resume != "never":
        check_still_there(run_dir)
    return wish


def check_still_there(run_dir: Path) -> None:
    """Raises UsageError if all saved checkpoints are gone: the disk may be missing, and the run would start again at step 1."""
    root = run_dir / "checkpoints"
    saved = None if named_as_steps(root) else last_saved(run_dir)
    if saved is not None:
        raise UsageError(
            f"{run_dir / 'events.jsonl'} says that the checkpoint of step {saved} was saved, but there is none in {root}: is its disk "
            "mounted? If they were deleted, checkpoint.resume=never starts again and keeps the old rows; or choose another run.name"
        )


def _back(config: Config, run_dir: Path, wish: Wish, lists: TokenLists | None) -> Note:
    assert wish.folder is not None
    saved = read_progress(wish.folder)
    if not config.grow and not config.phases:  # else the phase decides what is compared
        changes_since(config, saved, wish.folder, prints_of(config, lists))
    return go_back(run_dir, wish.folder, config.checkpoint.resume)


def _leave(why: str) -> None:
    """Called by the lock's thread: another job holds the directory, so this process ends at once and writes nothing more."""
    print(f"\nerror: {why}", file=sys.stderr, flush=True)
    os._exit(3)


def check_directory(run_dir: Path) -> None:
    """Raises UsageError for a directory with files that do not belong to a run."""
    try:
        with suppress(FileNotFoundError):
            run_dir.lstat()  # unlike exists() it raises for an impossible name
        if not run_dir.exists():
            if run_dir.is_symlink():
                raise UsageError(f"run.dir {run_dir} is a link to {os.readlink(run_dir)}, which does not exist: is its disk mounted?")
            return
        if not run_dir.is_dir():
            raise UsageError(f"run.dir {run_dir} is a file: choose another run.name or run.dir")
        names = set(os.listdir(run_dir))
    except (OSError, ValueError) as error:
        raise UsageError(f"run.dir {str(run_dir)[:200]!r} cannot be accessed ({error}): choose another one") from None
    foreign = {n for n in names - set(BESIDE) if not LEFT_OVER.fullmatch(n)}
    if foreign and not names & set(OWN_FILES):
        raise UsageError(
            f"run.dir {run_dir} holds files that no run wrote ({', '.join(sorted(foreign)[:3])}): choose another run.name or run.dir"
        )


def check_folders(config: Config, run_dir: Path) -> None:
    """Raises UsageError if the run cannot write into an existing folder that it will need: the first save would be too late."""
    growths = (run_dir / f"grown-{n + 1}" for n in range(len(config.grow)))
    unfinished = (folder for folder in growths if not os.path.lexists(folder / CONFIG))
    for folder in (run_dir / "checkpoints", *((run_dir / FOLDER,) if config.checkpoint.export == "hf" else ()), *unfinished):
        trial = folder / f".tmp-{os.getpid()}"
        try:
            if os.path.lexists(folder):
                trial.touch()
                trial.unlink()
        except OSError as error:
            raise UsageError(
                f"{folder} cannot be written ({error.strerror or error}), so the first save would fail: check the folder's "
                "owner, permissions and disk, or choose another run.dir"
            ) from None


def check_saved_config(config: Config, run_dir: Path, judge: bool = True) -> str | None:
    """Raises UsageError if the directory's config.yaml belongs to another run, unless `judge` is False, or if the disk cannot read it.
    Returns what is wrong with a damaged one; then the config in the checkpoint replaces it.
    """
    path = run_dir / "config.yaml"
    try:
        if not os.path.lexists(path):
            return None
        if not path.is_file():
            return f"{path}, which the run wrote, is not a file"
        path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}, which the run wrote, cannot be read ({error.strerror or error}): check the disk") from None
    try:
        there = build_config(read_yaml(path))
    except UsageError as error:
        if (newer := hint_of_newer(path)) is not None:
            raise UsageError(f"{error}\n  {newer}") from None
        return f"{path}, which the run wrote, is damaged ({' '.join(str(error).split())[:300]})"
    if not judge:
        return None
    then, now = identity(there), identity(config)
    # Whether moved data are the same, only the checkpoint can tell: it has fingerprints of them.
    moved = [k for k in SOURCES if only_moved(k, then.get(k), now.get(k))]
    check_identity(config, then, str(path), moved)
    return None


def claim_run_dir(config: Config, run_dir: Path, opening: Opening) -> list[Note]:
    """The first rank's last act before training: clears leftovers of earlier attempts and writes config.yaml. Returns notes about them.

    config  of the whole run
    """
    try:
        _sweep(run_dir)
        notes = _clear_names(run_dir / "checkpoints")
        discard(run_dir / "exit.json")  # from an earlier attempt
        if opening.damaged_config:
            kept = set_aside(run_dir / "config.yaml", aside_in(run_dir))
            notes.append(Note(f"{opening.damaged_config}; it is written again; the damaged one is kept as {kept}", "config_replaced"))
        if opening.elsewhere is not None:
            remember(run_dir / "checkpoints", config.checkpoint.resume, opening.elsewhere)
        elif config.checkpoint.resume in ("auto", "never"):
            forget(run_dir)
        write_atomic(run_dir / "config.yaml", stamped(to_yaml(config.plain())))
        if (run_dir / STOP).is_file():  # it may be meant for this start, so it counts
            notes.append(Note(f"{run_dir / STOP} exists: this start stops at its first step, and removes the file; delete it now to go on"))
    except OSError as error:
        raise UsageError(
            f"the run directory {run_dir} cannot be written ({error.strerror or error}: {error.filename}): make room there, or choose "
            "another run.dir"
        ) from None
    return notes


def _sweep(run_dir: Path) -> None:
    """Deletes files that a kill left half written, by their unique names."""
    root, now = run_dir / "checkpoints", time.time()
    for path in (*run_dir.iterdir(), *root.glob(".tmp-*"), *root.glob(".*.tmp")):
        ours = path.parent == root or LEFT_OVER.fullmatch(path.name)
        if ours and not (LOCK in path.name and now - path.lstat().st_mtime < 3 * STALE):  # another job may be taking the lock
            discard(path)


def _clear_names(root: Path) -> list[Note]:
    """Sets aside whatever occupies a name that checkpoints will need."""
    wrong = [path for _, path in named_as_steps(root) if not path.is_dir()]
    if (root / LATEST).is_dir():
        wrong.append(root / LATEST)
    return [Note(f"{p} is not a checkpoint, but its name is needed: it is now {set_aside(p, aside_in(root))}", "set_aside") for p in wrong]
