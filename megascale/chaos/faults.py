"""Faults of a run's processes and files. A new fault is a row of `PROCESS` or `FILES`."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from megascale.chaos.job import Job

SHORT = 2.0  # seconds of a harmless freeze
# Files whose content cannot be recreated: only damage that reading can repair is done to them.
IRREPLACEABLE = {"metrics.jsonl": ("garbage appended",), "events.jsonl": ("garbage appended", "one bit flipped", "truncated")}


def _signal(number: signal.Signals, who: str) -> Callable[[Job, Path, float, random.Random], bool]:
    def act(job: Job, run: Path, limit: float, chance: random.Random) -> bool:
        ranks = job.ranks()
        if who == "one":
            ranks = [chance.choice(ranks)] if ranks else []
        hit = [p.pid for p in job.processes if p.poll() is None] if who == "launcher" else ranks
        job.signal(hit, number)
        return bool(hit)

    return act


def _interrupt_twice(job: Job, run: Path, limit: float, chance: random.Random) -> bool:
    hit = job.ranks()
    job.signal(hit, signal.SIGINT)
    time.sleep(1.0)
    job.signal(job.ranks(), signal.SIGINT)
    return bool(hit)


def _freeze(who: str, beyond: bool) -> Callable[[Job, Path, float, random.Random], bool]:
    def act(job: Job, run: Path, limit: float, chance: random.Random) -> bool:
        ranks = job.ranks()
        if not ranks:
            return False
        chosen = ranks if who == "all" else ranks[:1] if who == "first" else [chance.choice(ranks)]
        job.signal(chosen, signal.SIGSTOP)
        time.sleep(limit + 10 if beyond else SHORT)
        job.signal(chosen, signal.SIGCONT)
        return True

    return act


def _stop_file(job: Job, run: Path, limit: float, chance: random.Random) -> bool:
    if run.is_dir():
        (run / "STOP").touch()
    return run.is_dir()


# name → action at the moment of the fault, which returns whether it hit anything; `limit` is run.collective_timeout in seconds.
PROCESS: dict[str, Callable[[Job, Path, float, random.Random], bool]] = {
    "SIGKILL all ranks": _signal(signal.SIGKILL, "all"),
    "SIGKILL one rank": _signal(signal.SIGKILL, "one"),
    "SIGKILL launcher": _signal(signal.SIGKILL, "launcher"),
    "SIGTERM all ranks": _signal(signal.SIGTERM, "all"),
    "SIGTERM one rank": _signal(signal.SIGTERM, "one"),
    "SIGHUP one rank": _signal(signal.SIGHUP, "one"),
    "SIGUSR1 one rank": _signal(signal.SIGUSR1, "one"),
    "SIGUSR2 all ranks": _signal(signal.SIGUSR2, "all"),
    "SIGINT twice": _interrupt_twice,
    "freeze all, short": _freeze("all", beyond=False),
    "freeze one, short": _freeze("one", beyond=False),
    "freeze first, beyond the limit": _freeze("first", beyond=True),
    "freeze one, beyond the limit": _freeze("one", beyond=True),
    "freeze all, beyond the limit": _freeze("all", beyond=True),
    "file STOP": _stop_file,
}


def _flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def _replace(make: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    def act(path: Path, chance: random.Random) -> None:
        path.unlink()
        make(path)

    return act


# name → change of a file between two attempts.
FILES: dict[str, Callable[[Path, random.Random], object]] = {
    "truncated": lambda path, chance: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path, chance: path.write_bytes(b""),
    "one bit flipped": _flip,
    "deleted": lambda path, chance: path.unlink(),
    "garbage": lambda path, chance: path.write_bytes(chance.randbytes(200)),
    "garbage appended": lambda path, chance: _append(path),
    "folder in its place": _replace(lambda path: path.mkdir()),
    "dangling link in its place": _replace(lambda path: path.symlink_to("/nowhere/to/be/found")),
    "pipe in its place": _replace(os.mkfifo),
}
# name → entry added to the run's directory or its checkpoints between two attempts.
ODD_FOLDERS = ("step-00000001", "step-99999999", ".tmp-step-00000007", "step-000x", ".tmp-del-step-00000003")


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'\xff\xfe\n{"step": "x", "time": 1}\n[1]\n{"step": 3')


def damage(run: Path, chance: random.Random) -> str | None:
    """Damages one file of a stopped run; returns a description, or None if there is nothing to damage.

    Spares the oldest checkpoint, since a run needs something to continue from.
    """
    steps = sorted(p for p in (run / "checkpoints").glob("step-*") if p.is_dir() and not p.is_symlink())
    files: dict[str, list[Path]] = {}
    for path in sorted(run.rglob("*")):
        spared = not path.is_file() or (steps and steps[0] in path.parents) or _is_set_aside(path.relative_to(run))
        if not spared:
            files.setdefault(path.name, []).append(path)
    if chance.random() < 0.1 and (run / "checkpoints").is_dir():
        odd = run / "checkpoints" / chance.choice(ODD_FOLDERS)
        if not odd.exists():
            odd.mkdir()
            return f"odd folder checkpoints/{odd.name}"
    if not files:
        return None
    name = chance.choice(sorted(files))
    path = chance.choice(files[name])
    kind = chance.choice(IRREPLACEABLE.get(name, tuple(FILES)))
    FILES[kind](path, chance)
    return f"{path.relative_to(run)} {kind}"


def _is_set_aside(path: Path) -> bool:
    """Whether a start has set the path aside, so that it no longer belongs to the run."""
    return any(word in str(path) for word in ("damaged", "aside"))


def remove(path: Path) -> None:
    """Removes leftovers of an earlier chain."""
    if path.exists():
        shutil.rmtree(path)
