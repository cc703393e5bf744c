"""Arithmetic on curves: distances, smoothing, thinning, and the stretches of a run's life."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megascale.report.read import Array, Row, RunData
from megascale.report.words import layout_words

# event → key with a better word than the event's name
WORDS = {
    "signal": "signal",
    "stop": "stopped",
    "skip": "skipped",
    "change": "changed",
    "growth": "grown",
    "grow": "grown",
    "save_failed": "save failed",
    "resume": "resumed",
}


@dataclass(frozen=True)
class Gap:
    """|Δ loss| of two runs at the steps where both losses are finite."""

    steps: Array
    delta: Array
    one_sided: int  # steps at which only one of the two is finite: neither a distance nor equal

    @property
    def largest(self) -> float:
        return float(self.delta.max()) if len(self.delta) else float("nan")

    @property
    def equal(self) -> int:
        """Number of steps that agree to the last bit in the files."""
        return int((self.delta == 0).sum())


def gap(run: RunData, reference: RunData) -> Gap:
    """Distances by step number, so that runs which log at different steps or end early are compared at common steps."""
    a, b = (dict(zip(*(s.tolist() for s in r.series("loss")))) for r in (run, reference))
    common = sorted(a.keys() & b.keys())
    delta = np.array([abs(a[s] - b[s]) for s in common], float)
    finite = np.isfinite(delta)
    one_sided = sum(np.isfinite(a[s]) != np.isfinite(b[s]) for s in common)
    return Gap(np.array(common, float)[finite], delta[finite], int(one_sided))


@dataclass(frozen=True)
class Segment:
    """The steps first..last, run on one layout."""

    first: int
    last: int
    layout: str
    resumed: bool

    @property
    def words(self) -> str:
        return layout_words(self.layout)


def segments(run: RunData) -> list[Segment]:
    """The stretches between resumes; a single one without a layout if none was recorded."""
    starts = [s for s in run.starts if s["step"] < run.last_step] or [{"step": 0, "event": "start"}]
    ends = [s["step"] for s in starts[1:]] + [run.last_step]
    return [Segment(s["step"] + 1, e, str(s.get("layout") or ""), s["event"] == "resume") for s, e in zip(starts, ends)]


def layouts(run: RunData) -> str:
    """The run's layouts in order, without consecutive repeats."""
    names = [s.layout or "not recorded" for s in segments(run)]
    return " → ".join(n for i, n in enumerate(names) if i == 0 or n != names[i - 1])


@dataclass(frozen=True)
class Marker:
    """Events at neighbouring steps in one label; `step` is the first of them."""

    step: int
    text: str
    resumed: bool


def markers(run: RunData, nearness: float = 0.0) -> list[Marker]:
    """Events that affect the curve. Events within `nearness` steps of a group's first share a label."""
    groups: list[list[Row]] = []
    for event in sorted(_in_effect(run), key=lambda e: e["step"]):
        if groups and event["step"] - groups[-1][0]["step"] <= nearness:
            groups[-1].append(event)
        else:
            groups.append([event])
    return [Marker(g[0]["step"], _together(g), any(e["event"] == "resume" for e in g)) for g in groups]


def _in_effect(run: RunData) -> list[Row]:
    """Events worth a mark; a resume from an earlier step undoes what came after that step."""
    found: list[Row] = []
    for event in run.events:
        if event["event"] in ("start", "resume"):
            found = [f for f in found if f["step"] <= event["step"]]
        if event["event"] in WORDS:
            found.append(event)
    return found


def _together(events: list[Row]) -> str:
    """ "stopped, resumed", "3 × skipped"."""
    tally: dict[str, int] = {}
    for event in events:
        word = _word(event)
        tally[word] = tally.get(word, 0) + 1
    return ", ".join(word if n == 1 else f"{n} × {word}" for word, n in tally.items())


def _word(event: Row) -> str:
    word = WORDS[event["event"]]
    if event["event"] == "signal":
        name: Any = event.get("signal") or event.get("name")
        return str(name) if name else word
    if event["event"] == "change" and isinstance(event.get("changes"), dict):
        keys = list(event["changes"])
        return f"{word} {', '.join(keys[:2])}" + ("…" if len(keys) > 2 else "")
    return word


def smooth(values: Array, share: float = 0.02) -> Array:
    """A centred mean over `share` of the points on either side, taken twice.

    The window shrinks towards both ends and stays symmetric, so that steep first steps are not distorted; NaN stays a gap and does not
    affect its neighbours.
    """
    reach = max(1, round(len(values) * share))
    place = np.arange(len(values))
    half = np.minimum(np.minimum(place, place[::-1]), reach)
    result = values
    for _ in range(2):
        known = np.isfinite(result)
        total = np.concatenate([[0.0], np.cumsum(np.where(known, result, 0.0))])
        number = np.concatenate([[0], np.cumsum(known)])
        low, high = place - half, place + half + 1
        result = np.where(known, (total[high] - total[low]) / np.maximum(number[high] - number[low], 1), np.nan)
    return result


def thin(steps: Array, values: Array, limit: int = 1600) -> tuple[Array, Array]:
    """At most about `limit` points that look the same: the smallest and the largest of every bin, and its gaps."""
    if len(steps) <= limit:
        return steps, values
    kept: set[int] = {0, len(steps) - 1}
    for bin_ in np.array_split(np.arange(len(steps)), limit // 3):
        inside = values[bin_]
        known = np.isfinite(inside)
        if known.any():
            kept.add(int(bin_[np.where(known, inside, np.inf).argmin()]))
            kept.add(int(bin_[np.where(known, inside, -np.inf).argmax()]))
        if not known.all():
            kept.add(int(bin_[known.argmin()]))
    index = np.array(sorted(kept))
    return steps[index], values[index]
