"""Chooses the checkpoint to resume from: the first rank chooses, every rank checks that it sees the same one, and all verify it together.

A damaged one is skipped with a reason, and the one before it is used. A disk error or a format that is too new is not damage: continuing
without that checkpoint would lose steps, so both are refused.
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

PATIENCE = 75.0  # seconds for a node to see what the first one sees: NFS caches folder listings for a minute
LOOK = 0.5  # seconds between two looks


@dataclass(frozen=True)
class Skipped:
    """A step folder that was skipped, and why."""

    folder: Path
    why: str


def candidates(root: Path) -> list[Path]:
    """Everything in `root` with the name of a step: first the one that `latest` names, then from the newest on. Raises UsageError."""
    named = named_latest(root)
    return sorted((path for _, path in reversed(named_as_steps(root))), key=lambda p: p.name != named)


def named_latest(root: Path) -> str:
    """The content of `latest`, or an empty string."""
    try:
        return (root / LATEST).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return ""
    except OSError as error:
        raise UsageError(f"{root / LATEST} cannot be read ({error.strerror or error}): check the disk, then try again") from None


def propose(root: Path, left_out: list[Skipped]) -> tuple[Path | None, list[Skipped]]:
    """The first candidate with valid JSON, and those skipped before it; `left_out` are already known to be damaged."""
    skipped, known, found = [], {s.folder for s in left_out}, candidates(root)
    named = root / named_latest(root)
    if STEP.fullmatch(named.name) and named.parent == root and named not in found and named not in known:
        skipped.append(Skipped(named, f"{root / LATEST} names {named.name}, which does not exist"))
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
    """The newest checkpoint in `root` whose files are all whole, the same on all ranks; and those that were skipped.

    floor  a checkpoint elsewhere, used unless `root` has a later step

    Collective over the group. Raises UsageError if there are step folders but none is whole: damage never restarts a run.
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
            raise UsageError(f"the checkpoint is damaged: {problem}; remove {path.parent} so that it is created again")
        skipped.append(Skipped(path, problem))


def confirm(path: Path, group: dist.ProcessGroup | None = None, patience: float = PATIENCE) -> None:
    """Reads the checkpoint `path` on all ranks together. Raises UsageError on all if it is damaged or they do not see the same one."""
    ranks = Agreement(group)
    seal = ranks.first(lambda: _checked_seal(path))
    problem = _together(ranks, path, seal, patience)
    if problem is not None:
        raise UsageError(f"{path} is damaged: {problem}; name another folder")


def none_whole(root: Path, skipped: list[Skipped]) -> str:
    others = f"; {len(skipped) - 1} more are damaged too" if len(skipped) > 1 else ""
    return (
        f"{root} holds checkpoints but none of them is whole: {skipped[0].why}{others}. Nothing was changed: repair the disk and run the "
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
        raise UsageError(f"{path} cannot be read ({error.strerror or error}): check the disk, then try again") from None


def seal_of(path: Path) -> str:
    """A digest of the two files that define a checkpoint. Raises OSError."""
    return hashlib.sha256((path / INDEX).read_bytes() + (path / TRAINER).read_bytes()).hexdigest()[:16]


def _together(ranks: Agreement, path: Path, seal: str, patience: float) -> str | None:
    """Verifies the checkpoint's files, divided among the ranks; returns what is wrong, or None."""

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
