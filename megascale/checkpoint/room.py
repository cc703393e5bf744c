"""Whether the checkpoints of a run have room on their disk: looked at before the first step, and told where a save fails."""

from __future__ import annotations

import shutil
from pathlib import Path

from megascale.checkpoint.folders import steps_in
from megascale.sizes import byte_words


def bytes_of(folder: Path) -> int:
    """Of all files below a folder; what goes away meanwhile has none."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except OSError:
            continue
    return total


def fitting(capacity: float, nbytes: int, milestones: int = 0) -> int:
    """The `checkpoint.keep_last` for which `capacity` bytes suffice: while one is written the others are still there."""
    return max(0, int(capacity // max(1, nbytes)) - 1 - milestones)


def after_failure(root: Path, nbytes: int, free: float | None = None) -> str:
    """What a save that found its disk full should have had. The folder that was being written counts as free: it is removed."""
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
    """A sentence and its numbers where the disk has less room than a run will ask for; None where it has enough.

    saves       how many checkpoints the run will write
    milestones  how many of them are kept for ever
    """
    free = _free(root) if free is None else free
    kept = [bytes_of(path) for _, path in steps_in(root)]
    most = min(keep_last + 1, len(kept) + saves) + milestones
    capacity = free + sum(kept)
    if most * nbytes <= capacity:
        return None
    where = f"{root} has room for {int(capacity // max(1, nbytes))} of them ({byte_words(capacity)}, those that are there included)"
    text = (
        f"a checkpoint takes {byte_words(nbytes)}, and checkpoint.keep_last {keep_last} needs room for {most}, the one that is being "
        f"written included{f', {milestones} of them for checkpoint.keep_every' if milestones else ''}; {where}"
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
