"""What a run has drawn from each source, so that a changed mixture continues every source where it was.

A run draws in segments, each with one mixture and one sequence length. The place in a source depends only on how many of its own samples
were drawn: a changed weight repeats nothing and skips nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from megascale.data.order import ALL, MixPlan, Unseen, plan_mixture
from megascale.errors import UsageError


class Unit(NamedTuple):
    """What a number within a source counts: windows of `seq_len` tokens, cut out of pieces of `chunk` tokens if that is not None."""

    seq_len: int
    chunk: int | None = None


@dataclass(frozen=True)
class Segment:
    """A finished part of a run's order, up to sample `end`: source → weight, and the unit of its numbers."""

    end: int
    weights: Mapping[str, float]
    seq_len: int
    chunk: int | None = None

    @property
    def unit(self) -> Unit:
        return Unit(self.seq_len, self.chunk)

    def same_order(self, other: Segment) -> bool:
        """Whether another segment draws as this one does: the same shares in the same order, and the same unit."""
        return self.unit == other.unit and _shares(self.weights) == _shares(other.weights)

    def plain(self) -> dict[str, Any]:
        return asdict(self)


Rescale = Callable[[str, Unseen, Unit, Unit], Unseen]


def read_segments(saved: Sequence[Any], where: str) -> list[Segment]:
    """Segments from a checkpoint's JSON. Raises UsageError."""
    try:
        return [Segment(int(s["end"]), dict(s["weights"]), int(s["seq_len"]), s["chunk"]) for s in saved]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{where}: `drawn` is damaged ({type(error).__name__}: {error}): resume from another checkpoint") from None


def closed(past: Sequence[Segment], then: Segment, now: Segment) -> list[Segment]:
    """The segments before `now` begins. `then`: how the run drew until sample `then.end`."""
    if then.end == (past[-1].end if past else 0) or then.same_order(now):
        return list(past)
    return [*past, then]


def same_unit(name: str, unseen: Unseen, then: Unit, now: Unit) -> Unseen:
    """Samples that are whole documents are numbered alike whatever the length."""
    return unseen


def continue_plan(
    plan: MixPlan, names: Sequence[str], past: Sequence[Segment], unit: Unit | None = None, rescale: Rescale = same_unit
) -> MixPlan:
    """`plan`, the mixture of the sources `names`, after the segments `past`. `unit` and `rescale`: for samples that are windows."""
    in_order = unit is not None and unit.chunk is not None
    if not past:
        return plan.continued(0, (), in_order)
    rest: dict[str, tuple[Unseen, Unit]] = {}
    start = 0
    for segment in past:
        listed = list(segment.weights)
        mine = [n for n in names if n in segment.weights]
        before = {n: _in(segment.unit, n, rest, rescale) for n in mine}
        unseen = tuple(before.get(n, ALL) for n in listed)
        drawn = plan_mixture(list(segment.weights.values()), listed, plan.seed).continued(start, unseen, segment.chunk is not None)
        rest |= {n: (drawn.left(listed.index(n), segment.end), segment.unit) for n in mine}
        start = segment.end
    last = unit or past[-1].unit
    return plan.continued(start, tuple(_in(last, n, rest, rescale) for n in names), in_order)


def _in(unit: Unit, name: str, rest: Mapping[str, tuple[Unseen, Unit]], rescale: Rescale) -> Unseen:
    if name not in rest:
        return ALL
    unseen, own = rest[name]
    return unseen if own == unit else rescale(name, unseen, own, unit)


def _shares(weights: Mapping[str, float]) -> list[tuple[str, float]]:
    total = sum(weights.values())
    return [(name, round(weight / total, 12)) for name, weight in weights.items()]
