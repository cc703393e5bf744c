"""What a changed mixture does to each source's place in its data, counted exactly.

A block of samples takes a source's next `quota` positions, in an order of its own. Another quota counts the blocks before otherwise, so the
run goes on elsewhere in every source whose share has changed: some samples come again, or some are never seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megascale.data.order import BLOCK, permute_many, plan_mixture


@dataclass(frozen=True)
class Moved:
    """Of one source of the new mixture: how many of its samples are drawn a second time, and how many never."""

    name: str
    repeated: int
    skipped: int


@dataclass(frozen=True)
class Part:
    """Positions in one source: all below `end`, and single ones that lie at or above it."""

    end: int
    single: NDArray[np.int64]


def moved(before: Mapping[str, float], after: Mapping[str, float], seed: int, samples: int) -> list[Moved]:
    """For every source of `after`, name → weight, as a run that drew `samples` samples under `before` goes on. Sources that neither repeat
    nor skip anything are left out.
    """
    drawn = {name: _drawn(before, name, seed, samples) for name in before}
    nothing = Part(0, np.empty(0, np.int64))
    found = []
    for name in after:
        passed, past = _drawn(after, name, seed, samples), drawn.get(name, nothing)  # where the new mixture believes to stand
        again, never = _only(past, passed), _only(passed, past)
        if again or never:
            found.append(Moved(name, again, never))
    return found


def sentence(changes: list[Moved]) -> str | None:
    """None where every source goes on where it stood."""
    if not changes:
        return None
    lines = [f"{m.name}: {m.repeated:,} samples are seen again and {m.skipped:,} are never seen" for m in changes]
    return f"the mixture has changed, and its sources continue at other positions: {'; '.join(lines)}"


def _drawn(weights: Mapping[str, float], name: str, seed: int, samples: int) -> Part:
    """The positions of source `name` that the first `samples` samples hold."""
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
    """How many positions are in `one` and not in `other`."""
    below = max(0, one.end - other.end)
    below -= int(((other.single >= other.end) & (other.single < one.end)).sum())
    above = one.single[one.single >= other.end]
    return below + int((~np.isin(above, other.single)).sum())
