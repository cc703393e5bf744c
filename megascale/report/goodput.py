"""Where a run's time went, over all its attempts: productive, data, saving, evaluating, lost, starting, waiting.

An attempt lasts from the start of a group's first process to its last sign of life: an event, a logged row, a heartbeat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megascale.report.canvas import COLOURS, GREY, heading, new_figure, style
from megascale.report.read import RunData, as_number
from megascale.rows import Row, as_time
from megascale.sizes import duration

# Kinds of time in drawing order, with their colours.
KINDS = {
    "productive": COLOURS[2],
    "data": COLOURS[3],
    "saving": COLOURS[5],
    "evaluating": COLOURS[0],
    "lost": COLOURS[1],  # steps repeated after a resume
    "starting": COLOURS[4],
    "waiting": GREY,  # between two attempts: in the queue, or not started
}
MEANING = {
    "productive": "steps that count",
    "data": "steps waiting for their batch",
    "saving": "training stalled by a checkpoint",
    "evaluating": "validation",
    "lost": "steps after the last checkpoint, repeated",
    "starting": "from the process to its first step",
    "waiting": "no process alive",
}


@dataclass(frozen=True)
class Attempt:
    """Seconds by kind; `began` and `ended` in seconds since the epoch, `waited` before it."""

    began: float
    ended: float
    first_step: int
    seconds: dict[str, float]


def attempts(run: RunData) -> list[Attempt]:
    """The attempts of a run in order; empty if its files have no times."""
    starts = [e for e in run.events if e["event"] in ("start", "resume") and math.isfinite(as_time(e.get("time")))]
    found: list[Attempt] = []
    for i, start in enumerate(starts):
        following = starts[i + 1] if i + 1 < len(starts) else None
        first = as_time(start["time"])
        end = _last_word(run, first, following)
        # Two attempts of one process, as in tests, share its start; a clock set back must not make times negative.
        began = min(max(_time(start.get("began"), first), found[-1].ended if found else 0.0), first)
        inside = [e for e in run.events if first <= _time(e.get("time"), -1.0) <= end]
        rows = [r for r in run.metrics if first < _time(r.get("time"), -1.0) <= end]
        saving = sum(_number(e.get("stalled"), 0.0) for e in inside if e["event"] == "save")
        evaluating = sum(_number(r.get("valid_seconds"), 0.0) for r in rows)
        parts = {
            "saving": saving,
            "evaluating": evaluating,
            "lost": _lost(start, first, end, following, saving + evaluating),
            "data": _data(rows, int(start["step"])),
        }
        seconds = {"starting": first - began, "waiting": max(0.0, began - found[-1].ended) if found else 0.0}
        left = end - first
        for kind, part in parts.items():
            seconds[kind] = min(max(part, 0.0), left)
            left -= seconds[kind]
        found.append(Attempt(began, end, int(start["step"]) + 1, {**seconds, "productive": left}))
    return found


def totals(found: Sequence[Attempt]) -> dict[str, float]:
    return {kind: sum(a.seconds[kind] for a in found) for kind in KINDS}


def goodput(found: Sequence[Attempt]) -> float:
    """Productive seconds over all seconds; NaN without any."""
    sums = totals(found)
    return sums["productive"] / total if (total := sum(sums.values())) > 0 else float("nan")


def goodput_figure(run: RunData) -> Figure | None:
    """One bar per attempt on a common clock, coloured by kind of time; None for a run without times."""
    found = attempts(run)
    if not found or found[-1].ended <= found[0].began:
        return None
    shown = found[-30:]
    scale, unit = _unit(shown[-1].ended - shown[0].began)
    with style():
        figure = new_figure(9.2, 0.55 + 0.24 * len(shown))
        heading(figure, None, [Patch(color=colour, label=kind) for kind, colour in KINDS.items()], 8.5)
        axes = figure.subplots()
        for i, attempt in enumerate(shown):
            left = attempt.began - shown[0].began
            # Kinds are drawn as sums, not where they happened: a save takes milliseconds, and there may be thousands.
            for kind in ("starting", "productive", "data", "evaluating", "saving", "lost"):
                axes.barh(i, attempt.seconds[kind] / scale, left=left / scale, height=0.62, color=KINDS[kind], linewidth=0)
                left += attempt.seconds[kind]
            if i and attempt.seconds["waiting"]:
                wait = attempt.seconds["waiting"]
                axes.barh(i, -wait / scale, left=(attempt.began - shown[0].began) / scale, height=0.12, color=KINDS["waiting"], linewidth=0)
        axes.set_yticks(range(len(shown)), [f"from step {a.first_step:,}" for a in shown], fontsize=8.5)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, (shown[-1].ended - shown[0].began) / scale)
        axes.set_xlabel(f"{unit} since the first process began", fontsize=9)
    return figure


def goodput_table(run: RunData) -> list[list[str]]:
    """Rows of kind, time, share and meaning, and a last row with the sum."""
    sums = totals(attempts(run))
    whole = sum(sums.values())
    rows = [[kind, duration(s), f"{100 * s / whole:.1f} %", MEANING[kind]] for kind, s in sums.items()] if whole > 0 else []
    return [*rows, ["all", duration(whole), "100 %", ""]] if rows else []


def _last_word(run: RunData, start: float, following: Row | None) -> float:
    """When an attempt was last alive, according to its files."""
    if following is not None:
        return max(start, min(_time(following.get("last_seen"), start), _time(following.get("time"), start)))
    times = [_time(row.get("time"), start) for row in [*run.metrics, *run.events]]
    return max([start, *times])


def _lost(start: Row, first: float, end: float, following: Row | None, idle: float) -> float:
    """Seconds of steps that the next attempt repeated, at this attempt's mean speed."""
    if following is None:
        return 0.0
    again = _number(following.get("lost_steps"), 0.0)
    done = _number(following.get("step"), 0.0) + again - _number(start.get("step"), 0.0)
    busy = max(0.0, end - first - idle)
    return busy * min(1.0, again / done) if done > 0 else 0.0


def _data(rows: Sequence[Row], step: int) -> float:
    """Seconds of waiting for batches: a row covers the steps since the previous row, the first one since the start at `step`."""
    total = 0.0
    for row in rows:
        total += _number(row.get("data_seconds"), 0.0) * max(0, row["step"] - step)
        step = row["step"]
    return total


def _time(value: object, other: float) -> float:
    seconds = as_time(value)
    return seconds if seconds == seconds else other


def _number(value: object, other: float) -> float:
    number = as_number(value)
    return number if number == number else other


def _unit(seconds: float) -> tuple[float, str]:
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return size, unit
    return 1.0, "seconds"
