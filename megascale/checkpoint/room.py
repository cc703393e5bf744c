"""Disk space for a run's checkpoints: checked before the first step, and reported when a save fails."""

from __future__ import annotations

import shutil
from pathlib import Path

from megascale.checkpoint.folders import steps_in
from megascale.sizes import byte_words


def bytes_of(folder: Path) -> int:
    """Bytes of all files below a folder; files that disappear meanwhile count as 0."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except OSError:
            continue
    return total


def fitting(capacity: float, nbytes: int, milestones: int = 0) -> int:
    """The `checkpoint.keep_last` for which `capacity` bytes suffice, while another one is being written."""
    return max(0, int(capacity // max(1, nbytes)) - 1 - milestones)


def after_failure(root: Path, nbytes: int, free: float | None = None) -> str:
    """What a save on a full disk would have needed. The unfinished folder counts as free, since it is removed."""
    free, half = _free(root) if free is None else free, sum(bytes_of(p) for p in root.glob(".tmp-*"))
    kept = [bytes_of(path) for _, path in steps_in(root)]
    text = (
        f"a checkpoint takes {byte_words(nbytes)}, {byte_words(free + half)} are free for it on that disk, and {len(kept)} "
        f"older ones take {byte_words(sum(kept))}"
    )
    return f"{text}; {_advice(fitting(free + half + sum(kept), nbytes), len(kept))}"


def before_start(
    root: Path, nbytes: int, keep_last: int, saves: int, milestones: int = 0, free: float | None = None
) -> tuple[str, dict[str, int]] | None:
    """A warning and its numbers if the disk has less room than a run will need; None if it has enough.

    saves       number of checkpoints that the run will write
    milestones  number of them that are kept forever
    """
    free = _free(root) if free is None else free
    kept = [bytes_of(path) for _, path in steps_in(root)]
    most = min(keep_last + 1, len(kept) + saves) + milestones
    capacity = free + sum(kept)
    if most * nbytes <= capacity:
        return None
    where = f"{root} has room for {int(capacity // max(1, nbytes))} of them ({byte_words(capacity)}, including existing ones)"
    text = (
        f"a checkpoint takes {byte_words(nbytes)}, and checkpoint.keep_last {keep_last} needs room for {most}, including the one being "
        f"written{f', {milestones} of them for checkpoint.keep_every' if milestones else ''}; {where}"
    )
    facts = {"checkpoint_bytes": nbytes, "needed_bytes": most * nbytes, "free_bytes": int(free), "held_bytes": sum(kept)}
    return f"{text}; {_advice(fitting(capacity, nbytes, milestones), keep_last)}", facts


def _advice(keep: int, now: int) -> str:
    if keep < 1:
        return "not even two fit, so make room there, or choose another run.dir"
    if keep < now:
        return f"checkpoint.keep_last={keep} would fit, or make room there"
    return "make room there"


def _free(root: Path) -> float:
    place = next(p for p in (root, *root.absolute().parents) if p.exists())
    return float(shutil.disk_usage(place).free)
