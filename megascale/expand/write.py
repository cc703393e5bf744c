"""From a plan to a checkpoint on disk, for growing and shrinking: target folder, use of the machine, and continuing after a kill."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megascale.checkpoint.folders import LATEST, step_name
from megascale.checkpoint.index import Index, read_index
from megascale.checkpoint.loader import verify
from megascale.checkpoint.streaming import Progress, Target, write_streamed
from megascale.checkpoint.trainer import read_trainer
from megascale.config.identity import identity
from megascale.config.load import to_yaml
from megascale.config.saved import CONFIG, stamped
from megascale.config.schema import Config
from megascale.errors import TrainingError, UsageError
from megascale.expand.source import GrowthSource
from megascale.files import write_durably
from megascale.sizes import byte_words


@dataclass(frozen=True)
class Effort:
    """Resources and checks of a growth. They do not change a bit of the result.

    slab_bytes  bytes of target rows computed at once; a worker needs about three times as much
    tokens      number of tokens to compare both models on; 0 skips that
    check       verify the checksums of the source's files first
    """

    workers: int = 1
    slab_bytes: int = 256 << 20
    tokens: int = 128
    check: bool = True
    data: str | None = None


class Made(Protocol):
    """Tensors of a checkpoint to write, produced rectangle by rectangle. `stamp` identifies what they are made from."""

    def __call__(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor: ...

    def targets(self) -> list[Target]: ...

    @property
    def stamp(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


def check_target(target: Path, opened: GrowthSource, made: Made) -> Path | None:
    """The checkpoint that this same growth wrote before it was killed; None if it must still be written.

    Raises UsageError if the target holds something else, is inside the source, or has no room. A killed growth's folder is accepted.
    """
    source = opened.index.folder
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise UsageError(f"{target} is inside the source {source}: name a folder next to it")
    written = _written(target, step_of(opened), made.stamp)
    known = {LATEST, step_name(step_of(opened))} if written is not None else set()
    if target.exists() and (not target.is_dir() or any(not p.name.startswith(".tmp-") and p.name not in known for p in target.iterdir())):
        raise UsageError(f"{target} exists already: name a folder that does not, or remove it")
    place = next(p for p in (target, *target.absolute().parents) if p.exists())
    if not place.is_dir():
        raise UsageError(f"{target} cannot be made: {place} is a file")
    free = shutil.disk_usage(place).free + sum(f.stat().st_size for f in target.glob(".tmp-*/*") if f.is_file())
    if written is None and free < made.nbytes:
        raise UsageError(
            f"{target} needs {byte_words(made.nbytes)} but its disk has {byte_words(free)} free: make room, or name another disk"
        )
    return written


def _written(target: Path, step: int, stamp: str) -> Path | None:
    """The step folder of the same growth if it has no config yet, which is written last."""
    folder = target / step_name(step)
    if not folder.is_dir() or (target / CONFIG).exists():
        return None
    made_by = read_trainer(folder).get("made")
    return folder if isinstance(made_by, dict) and made_by.get("stamp") == stamp else None


def step_of(opened: GrowthSource) -> int:
    """The source's training step; 0 for a converted checkpoint, which has none."""
    step = opened.trainer.get("step")
    return step if isinstance(step, int) else 0


def write(
    opened: GrowthSource, target: Path, made: Made, config: Config, how: dict[str, Any], effort: Effort, progress: Progress | None
) -> Index:
    """Streams the checkpoint into `target` and returns its index, whose chunks fill every tensor once. `how` goes into its trainer.json.

    Raises TrainingError if the source turns out to be damaged, UsageError if the disk is too small or fails; then nothing is left.
    """
    trainer = {
        **{k: v for k, v in opened.trainer.items() if k not in ("identity", "config", "made")},
        "identity": identity(config),
        "config": config.plain(),
        "made": {"from": str(opened.index.folder), "stamp": made.stamp, **how},
    }
    try:
        folder = write_streamed(
            target, step_of(opened), made.targets(), made, trainer, stamp=made.stamp, workers=effort.workers,
            slab_bytes=effort.slab_bytes, progress=progress,
        )  # fmt: skip
    except UsageError as error:
        if problems := verify(opened.index):
            raise TrainingError(
                f"the source was found damaged on the way: {'; '.join(problems)}; {target} was not made, use another checkpoint"
            ) from error
        raise
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error}; nothing is left there, make room or name another disk") from error
    return read_index(folder)


def finish(target: Path, config: Config) -> None:
    """Writes the config next to the checkpoint, which tells a rerun that nothing is left to do."""
    try:
        write_durably(target / CONFIG, stamped(to_yaml(config.plain())).encode())
    except OSError as error:
        raise UsageError(f"{target / CONFIG} cannot be written: {error}; make room and run the same command again") from error
