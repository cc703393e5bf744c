"""How a process ends: exit codes, and exit.json for scripts whose launcher changes them."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megascale.files import write_atomic
from megascale.launch.ranks import RankInfo, node_name

# What torch and the communication libraries say, in lower case, when a peer is gone or silent. They raise plain RuntimeErrors.
PEER_WORDS = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "timed out",
    "timeout",
    "nccl",
    "broken pipe",
    "gloo",
)
MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


@dataclass(frozen=True)
class Exit:
    code: int
    reason: str


def as_exit(error: BaseException) -> Exit | None:
    """Memory and peers by what their errors say; None for anything else, which is a bug and keeps its traceback."""
    if error.__cause__ is not None and (known := as_exit(error.__cause__)) is not None:
        return known  # the pipeline's runtime wraps what a stage raises
    text = f"{type(error).__name__}: {error}".lower()
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, MemoryError) or any(w in text for w in MEMORY_WORDS):
        return Exit(4, f"out of memory ({first})")
    if isinstance(error, RuntimeError) and any(w in text for w in PEER_WORDS):
        return Exit(5, f"a peer is gone or silent ({first}); run the same command again")
    return None


def write_exit(run_dir: Path | None, ending: Exit, ranks: RankInfo, step: int) -> None:
    """exit.json of the run. Rank 0 writes it; another rank does when it knows of a failure that rank 0 may not live to tell."""
    if run_dir is None or not run_dir.is_dir() or (ranks.rank != 0 and ending.code in (0, 2, 3, 75)):
        return
    record = {"code": ending.code, "reason": ending.reason, "rank": ranks.rank, "node": node_name(), "step": step}
    with suppress(OSError):  # a full disk must not hide the reason, which is printed as well
        write_atomic(run_dir / "exit.json", json.dumps(record) + "\n")
