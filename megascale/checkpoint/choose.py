"""Which checkpoint of a run is gone on from: the first rank chooses, every rank sees that it has the same one, and all read it together.

What is damaged is left out, with the reason, and the one before it stands in. A disk that does not let a checkpoint be read, and a format
that is too new, are no damage: going on without it would lose steps, so they are refused.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megascale.checkpoint.folders import LATEST, STEP, named_as_steps
from megascale.checkpoint.index import INDEX, TRAINER, Damaged, file_problem, read_index
from megascale.checkpoint.trainer import read_trainer
from megascale.comm.agreement import Agreement
from megascale.errors import UsageError
from megascale.launch.ranks import node_name

PATIENCE = 75.0  # seconds that a node has to see what the first one sees: NFS keeps a folder's listing for a minute
LOOK = 0.5  # seconds between two looks


@dataclass(frozen=True)
class Skipped:
    """A step folder that was left out, and why."""

    folder: Path
    why: str


def candidates(root: Path) -> list[Path]:
    """What bears a step's name in `root`, the one that `latest` names first, then from the last step on. Raises UsageError."""
    named = named_latest(root)
    return sorted((path for _, path in reversed(named_as_steps(root))), key=lambda p: p.name != named)


def named_latest(root: Path) -> str:
    """What `latest` says, or nothing."""
    try:
        return (root / LATEST).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return ""
    except OSError as error:
        raise UsageError(f"{root / LATEST} cannot be read ({error.strerror or error}): look at the disk, then try again") from None


def propose(root: Path, left_out: list[Skipped]) -> tuple[Path | None, list[Skipped]]:
    """The first candidate whose JSON is sound, and those left out before it; `left_out` are known to be damaged already."""
    skipped, known, found = [], {s.folder for s in left_out}, candidates(root)
    named = root / named_latest(root)
    if STEP.fullmatch(named.name) and named.parent == root and named not in found and named not in known:
        skipped.append(Skipped(named, f"{root / LATEST} names {named.name}, and it is not there"))
    for path in found:
        if path in known:
            continue
        try:
            read_index(path)
            read_trainer(path)
        except Damaged as error:
            skipped.append(Skipped(path, str(error)))
            continue
        return path, skipped
    return None, skipped


def choose(
    root: Path, floor: Path | None = None, group: dist.ProcessGroup | None = None, patience: float = PATIENCE
) -> tuple[Path | None, list[Skipped]]:
    """The newest whole checkpoint in `root`, the same on all ranks, all of its files read; and those that were left out.

    floor  a checkpoint elsewhere, unless one of `root` is of a later step

    Collective over the group. Raises UsageError where step folders are there and none is whole: nothing begins anew because of damage.
    """
    ranks = Agreement(group)
    skipped: list[Skipped] = []
    while True:
        path, more, seal = ranks.first(lambda: _sealed(root, skipped, floor))  # noqa: B023
        skipped += more
        if path is None:
            if skipped:
                raise UsageError(none_whole(root, skipped))
            return None, []
        problem = _together(ranks, path, seal, patience)
        if problem is None:
            return path, skipped
        if path == floor:
            raise UsageError(f"the checkpoint is damaged: {problem}; remove {path.parent}, and it is made again")
        skipped.append(Skipped(path, problem))


def confirm(path: Path, group: dist.ProcessGroup | None = None, patience: float = PATIENCE) -> None:
    """Reads the checkpoint `path` on all ranks together. Raises UsageError on all where it is damaged or they do not see the same one."""
    ranks = Agreement(group)
    seal = ranks.first(lambda: _checked_seal(path))
    problem = _together(ranks, path, seal, patience)
    if problem is not None:
        raise UsageError(f"{path} is damaged: {problem}; name another folder")


def none_whole(root: Path, skipped: list[Skipped]) -> str:
    others = f"; {len(skipped) - 1} more are damaged too" if len(skipped) > 1 else ""
    return (
        f"{root} holds checkpoints and none of them is whole: {skipped[0].why}{others}. Nothing was changed: mend the disk and run the "
        "same command again, or choose another run.name to start a new run"
    )


def _sealed(root: Path, skipped: list[Skipped], floor: Path | None) -> tuple[Path | None, list[Skipped], str]:
    path, more = propose(root, skipped)
    if floor is not None and (path is None or int(path.name.rpartition("-")[2]) <= int(floor.name.rpartition("-")[2])):
        path = floor
    return path, more, "" if path is None else _checked_seal(path)


def _checked_seal(path: Path) -> str:
    read_index(path)
    read_trainer(path)
    try:
        return seal_of(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}): look at the disk, then try again") from None


def seal_of(path: Path) -> str:
    """A digest of the two files that say what a checkpoint is. Raises OSError."""
    return hashlib.sha256((path / INDEX).read_bytes() + (path / TRAINER).read_bytes()).hexdigest()[:16]


def _together(ranks: Agreement, path: Path, seal: str, patience: float) -> str | None:
    """What is wrong with the checkpoint's files, which are divided between the ranks; None where they are whole."""

    def read() -> str | None:
        _see(path, seal, patience)
        index = read_index(path)
        names = sorted(index.files)[ranks.rank :: ranks.size]
        return next((problem for name in names if (problem := file_problem(index, name)) is not None), None)

    _, problems = ranks.all(read, lambda problem: problem)
    return next((p for p in problems if p is not None), None)


def _see(path: Path, seal: str, patience: float) -> None:
    """Waits until this node sees the checkpoint that the first rank has chosen."""
    deadline = time.monotonic() + patience
    while True:
        try:
            seen = seal_of(path)
        except OSError as error:
            seen = f"nothing that could be read ({error.strerror or error})"
        if seen == seal:
            return
        if time.monotonic() >= deadline:
            raise UsageError(
                f"{node_name()} sees {seen} in {path} and the first rank {seal}, {patience:.0f} s later still: does every node see the "
                "same run.dir? Leave that node out, or mount the disk anew"
            )
        time.sleep(LOOK)
