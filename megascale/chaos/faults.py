"""What can happen to a run: faults of its processes and of its files. A new one is a row of `PROCESS` or `FILES`."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from megascale.chaos.job import Job

SHORT = 2.0  # seconds of a freeze that nobody should mind
# Files whose content cannot be had again if it is destroyed: only what may be put right by reading is done to them.
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


# name → what is done at the moment of the fault, and whether it hit anything; `limit` is run.collective_timeout in seconds.
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


# name → what is done to a file between two attempts.
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
# name → what is put into the run's directory or its checkpoints between two attempts.
ODD_FOLDERS = ("step-00000001", "step-99999999", ".tmp-step-00000007", "step-000x", ".tmp-del-step-00000003")


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'\xff\xfe\n{"step": "x", "time": 1}\n[1]\n{"step": 3')


def damage(run: Path, chance: random.Random) -> str | None:
    """Damages one file of a stopped run; says what was done, or None where there is nothing to damage.

    The oldest checkpoint is spared, since a run must have something to go on from.
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
    """What a start has put aside belongs to the run no more."""
    return any(word in str(path) for word in ("damaged", "aside"))


def remove(path: Path) -> None:
    """Removes what an earlier chain left."""
    if path.exists():
        shutil.rmtree(path)
