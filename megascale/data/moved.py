"""Counts exactly how a changed mixture moves each source's position in its data.

A block of samples takes a source's next `quota` positions, shuffled. Another quota counts earlier blocks differently, so a source whose
share has changed continues at another position: some samples repeat, or some are never seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megascale.data.order import BLOCK, permute_many, plan_mixture


@dataclass(frozen=True)
class Moved:
    """One source of the new mixture: the number of its samples that are drawn twice, and the number never drawn."""

    name: str
    repeated: int
    skipped: int


@dataclass(frozen=True)
class Part:
    """Positions in one source: all below `end`, and single ones at or above it."""

    end: int
    single: NDArray[np.int64]


def moved(before: Mapping[str, float], after: Mapping[str, float], seed: int, samples: int) -> list[Moved]:
    """For every source of `after` (name → weight), when a run that drew `samples` samples under `before` continues. Omits sources that
    neither repeat nor skip anything.
    """
    drawn = {name: _drawn(before, name, seed, samples) for name in before}
    nothing = Part(0, np.empty(0, np.int64))
    found = []
    for name in after:
        passed, past = _drawn(after, name, seed, samples), drawn.get(name, nothing)  # where the new mixture assumes to be
        again, never = _only(past, passed), _only(passed, past)
        if again or never:
            found.append(Moved(name, again, never))
    return found


def sentence(changes: list[Moved]) -> str | None:
    """A warning about the changes; None if every source continues at its position."""
    if not changes:
        return None
    lines = [f"{m.name}: {m.repeated:,} samples are seen again and {m.skipped:,} are never seen" for m in changes]
    return f"the mixture has changed, and its sources continue at other positions: {'; '.join(lines)}"


def _drawn(weights: Mapping[str, float], name: str, seed: int, samples: int) -> Part:
    """The positions of source `name` in the first `samples` samples."""
    names = list(weights)
    if len(names) == 1:
        return Part(samples, np.empty(0, np.int64))
    quotas = plan_mixture([weights[n] for n in names], names, seed).quotas
    which = names.index(name)
    first, quota = sum(quotas[:which]), quotas[which]
    block, rest = divmod(samples, BLOCK)
    places = permute_many(np.arange(rest, dtype=np.int64), BLOCK, seed, "mix", block) - first
    return Part(block * quota, block * quota + np.sort(places[(places >= 0) & (places < quota)]))


def _only(one: Part, other: Part) -> int:
    """The number of positions in `one` that are not in `other`."""
    below = max(0, one.end - other.end)
    below -= int(((other.single >= other.end) & (other.single < one.end)).sum())
    above = one.single[one.single >= other.end]
    return below + int((~np.isin(above, other.single)).sum())
