"""Checks before the first step whether the disk has room for a run's checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

from megascale.checkpoint.index import read_index
from megascale.checkpoint.room import before_start
from megascale.config.layout import axis_sizes
from megascale.config.schema import Checkpoint, Config, Parallel
from megascale.errors import MegascaleError
from megascale.train.estimate.memory import largest_rank
from megascale.train.start.branch import Note
from megascale.train.start.resume import RunStart


def room_for(config: Config, run_dir: Path, start: RunStart, step: int, until: int) -> list[Note]:
    """A warning if the disk has less room than the run will need. Called on the first rank."""
    try:
        nbytes = checkpoint_bytes(config, start)
        saves, milestones = saves_of(config.checkpoint, step, until)
        found = before_start(run_dir / "checkpoints", nbytes, config.checkpoint.keep_last, saves, milestones)
    except (OSError, MegascaleError):  # a failed estimate must not keep a run from starting
        return []
    return [] if found is None else [Note(found[0], "disk_room", found[1])]


def checkpoint_bytes(config: Config, start: RunStart) -> int:
    """Bytes of one checkpoint: those of the last one, else the state that a single rank would hold."""
    if start.folder is not None and not start.weights_only and start.foreign is None:
        return sum(entry.bytes for entry in read_index(start.folder).files.values())
    alone = config.model_copy(update={"parallel": Parallel()})
    held = largest_rank(alone, axis_sizes(Parallel(), 1))
    return held["parameters"] + held["optimizer"]


def saves_of(keep: Checkpoint, step: int, until: int) -> tuple[int, int]:
    """(number of checkpoints written after `step` until the last one, number of them kept for ever)."""
    saves = 1 if not keep.every else math.ceil(until / keep.every) - step // keep.every
    if not keep.keep_every or not keep.every:
        return saves, 0
    every = math.lcm(keep.every, keep.keep_every)
    return saves, max(0, until // every - step // every)
