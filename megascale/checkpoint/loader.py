"""Finding, checking and loading checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megascale.checkpoint.index import Index, file_problem, read_index, read_json
from megascale.checkpoint.planning import LoadPlanner, views
from megascale.checkpoint.storage import ShardReader
from megascale.comm.piece import Piece
from megascale.errors import MegascaleError, UsageError


def steps_in(root: Path) -> list[Path]:
    """Published checkpoints below a `checkpoints` folder, oldest first."""
    return sorted(p for p in root.glob("step-*") if p.is_dir())


def newest(root: Path) -> Path | None:
    """The newest whole checkpoint: where `latest` points, or the last published folder when that is gone or damaged."""
    try:
        named = root / (root / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        named = None
    candidates = [p for p in reversed(steps_in(root)) if p != named]
    # A folder newer than `latest` was published by a run that was killed before it could say so; it is whole all the same.
    ordered = sorted([*candidates, *([named] if named is not None and named.parent == root else [])], key=lambda p: p.name, reverse=True)
    for path in ordered:
        try:
            read_index(path)
        except UsageError:
            continue
        return path
    return None


def find(path: str | Path) -> Path:
    """A step folder, a run directory or its `checkpoints` folder → the step folder. Raises UsageError."""
    where = Path(path)
    if (where / "index.json").is_file():
        return where
    for root in (where / "checkpoints", where):
        found = newest(root) if root.is_dir() else None
        if found is not None:
            return found
    raise UsageError(f"{where} is no checkpoint and holds none: name a folder step-…, or a run directory with checkpoints")


def verify(folder: Path, index: Index, part: int = 0, parts: int = 1) -> list[str]:
    """Problems of the shard files (this rank's `part` of them): missing, other sizes, other checksums."""
    names = sorted(index.files)[part::parts]
    return [p for name in names if (p := file_problem(folder, name, index.files[name])) is not None]


def load(folder: Path, state: dict[str, Piece], group: dist.ProcessGroup | None = None, prefix: str | None = None) -> dict[str, Any]:
    """Fills the pieces of `state` in place, on any layout, and returns the trainer's JSON. Collective over `group`.

    With `prefix` only names that begin with it are expected. Raises the same UsageError on every rank, before anything is changed,
    for files that are missing, damaged or do not fit.
    """
    index = read_index(folder)
    parts = dist.get_world_size(group) if dist.is_initialized() else 1
    problems = verify(folder, index, dist.get_rank(group) if parts > 1 else 0, parts)
    if parts > 1:
        everyone: list[list[str] | None] = [None] * parts
        dist.all_gather_object(everyone, problems, group=group)
        problems = [p for some in everyone for p in some or ()]
    if problems:
        raise UsageError(f"the checkpoint {folder} is damaged: {problems[0]}; resume from an older one with checkpoint.resume=FOLDER")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        try:
            dcp.load(
                views(state),
                storage_reader=ShardReader(folder, index),
                planner=LoadPlanner(str(folder), prefix),
                process_group=group,
                no_dist=parts == 1,
            )
        except CheckpointException as error:
            raise first_cause(error) from None
    return read_json(folder / "trainer.json")


def first_cause(error: CheckpointException) -> BaseException:
    """The failure of the lowest rank, preferring one that a user can act on."""
    causes = [failure[0] for _, failure in sorted(error.failures.items())]
    return next((c for c in causes if isinstance(c, MegascaleError)), causes[0])
