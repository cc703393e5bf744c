"""Merges checkpoints of one model into their weighted mean: of a run's last checkpoints, or of several runs with the same model.

A mean over the constant phase of a schedule comes near to what a decay would reach, without training it (checkpoint averaging: Izmailov et
al., arXiv 1803.05407; over stable phases of language models: Li et al., arXiv 2505.12082).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale.checkpoint.folders import named_as_steps
from megascale.checkpoint.index import read_index
from megascale.checkpoint.streaming import Progress, Target
from megascale.errors import UsageError
from megascale.expand.source import GrowthSource, open_source, renamed
from megascale.expand.write import Effort, check_target, finish, step_of, write
from megascale.formats.hf.config import differences
from megascale.formats.sources import AveragedTensors, StoredTensors
from megascale.optim.averages import own_average


@dataclass(frozen=True)
class Mean:
    """The weighted mean of the same tensors of several checkpoints, rectangle by rectangle: plain data, which workers pickle. Sums are at
    least fp32; whole numbers are those of the last checkpoint.
    """

    sources: tuple[StoredTensors, ...]
    shares: tuple[float, ...]

    def __call__(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        last = self.sources[-1].read(name, offset, shape)
        if not last.is_floating_point():
            return last
        total = last.to(torch.promote_types(last.dtype, torch.float32)) * self.shares[-1]
        for source, share in zip(self.sources[:-1], self.shares):
            total.add_(source.read(name, offset, shape).to(total.dtype), alpha=share)
        return total.to(last.dtype)

    def targets(self) -> list[Target]:
        return [target for name, target in self.sources[-1].tensors.items() if name.startswith("model.")]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets())

    @property
    def stamp(self) -> str:
        """Identifies the sources, by their files' checksums, and their shares."""
        files = [(i.folder.name, sorted((n, f.crc32) for n, f in i.files.items())) for i in (s.index for s in self.sources)]
        return hashlib.sha256(repr((files, self.shares)).encode()).hexdigest()


def merge(
    sources: Sequence[str | Path], target: Path, weights: Sequence[float] | None, effort: Effort, progress: Progress | None = None
) -> dict[str, Any]:
    """Writes the mean of the weights of `sources`, step folders or runs, into `target`, and returns facts about it. `weights` are relative;
    None: equal.

    Raises UsageError for sources with different models, and as `megascale grow`.
    """
    begun = time.perf_counter()
    opened = [open_source(source, effort.check) for source in sources]
    check_alike(opened)
    shares = shares_of(weights, len(opened))
    mean = Mean(tuple(weights_of(o) for o in opened), shares)
    last = opened[-1]
    written = check_target(target, last, mean)
    config = renamed(last.config, "merged")
    how = {"by": "merge", "of": [str(o.index.folder) for o in opened], "weights": list(shares)}
    index = write(last, target, mean, config, how, effort, progress) if written is None else read_index(written)
    finish(target, config)
    return {
        "target": str(index.folder),
        "sources": how["of"],
        "steps": [step_of(o) for o in opened],
        "weights": list(shares),
        "bytes": mean.nbytes,
        "seconds": round(time.perf_counter() - begun, 2),
    }


def weights_of(opened: GrowthSource) -> StoredTensors:
    """The weights, or the average that an optimizer has in their place."""
    average = own_average(opened.config.optim)
    return StoredTensors(opened.index, "") if average is None else AveragedTensors(opened.index, "", average)


def last_of(run: Path, number: int, every: int | None) -> list[Path]:
    """The last `number` checkpoints of a run, `every` so many steps. Raises UsageError if it has fewer."""
    there = [(step, folder) for step, folder in named_as_steps(run / "checkpoints") if folder.is_dir()]
    if not there:
        raise UsageError(f"{run} holds no checkpoints: name the directory of a run")
    end = there[-1][0]
    chosen = [folder for step, folder in there if every is None or (end - step) % every == 0][-number:]
    if len(chosen) < number:
        steps = ", ".join(str(step) for step, _ in there)
        apart = "" if every is None else f" that are multiples of {every} steps before step {end}"
        raise UsageError(
            f"--last is {number}, but {run} has {len(chosen)} checkpoints{apart} (of steps {steps}): take fewer, or keep more with "
            "checkpoint.keep_last and checkpoint.keep_every"
        )
    return chosen


def check_alike(opened: Sequence[GrowthSource]) -> None:
    """Raises UsageError if two checkpoints are not of one model, or one is given twice."""
    first, seen = opened[0], set[Path]()
    for other in opened:
        folder = other.index.folder.resolve()
        if folder in seen:
            raise UsageError(f"{folder} is given twice: a larger weight counts it more")
        seen.add(folder)
        changed = {key: values for key, values in differences(first.model, other.model).items() if key != "dropout"}
        if changed:
            key, (then, now) = next(iter(changed.items()))
            raise UsageError(
                f"model.{key} is {then!r} in {first.index.folder} and {now!r} in {other.index.folder}: only checkpoints of one model can "
                "be merged"
            )
    if len(opened) < 2:
        raise UsageError("merging needs two checkpoints or more: name them, or a run with --last N")


def shares_of(weights: Sequence[float] | None, number: int) -> tuple[float, ...]:
    """Weights that add up to 1. Raises UsageError."""
    given = [1.0] * number if weights is None else list(weights)
    if len(given) != number:
        raise UsageError(f"--weights has {len(given)} numbers, but there are {number} checkpoints: give one for each")
    total = math.fsum(given)
    if not all(map(math.isfinite, given)) or total <= 0:
        raise UsageError(f"--weights are {', '.join(f'{w:g}' for w in given)}: they must be finite and add up to more than 0")
    return tuple(weight / total for weight in given)
