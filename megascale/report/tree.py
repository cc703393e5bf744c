"""The tree of runs: a trunk, and the branches that begin at its checkpoints (`megascale branch`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from megascale.report.canvas import COLOURS, GREY, INK, label, new_figure, step_axis, style
from megascale.report.read import RunData
from megascale.report.words import fixed
from megascale.rows import Row

LANE = 0.42  # inches


def tree_figure(runs: Sequence[RunData]) -> Figure | None:
    """A line per run over its steps; a branch leaves its trunk's line at its first step. None if no run is a branch of another here."""
    places = {run.folder.resolve(): run for run in runs}
    parents = {run.name: parent.name for run in runs if (begin := began(run)) and (parent := places.get(Path(str(begin.get("trunk")))))}
    if not parents:
        return None
    order = _ordered(runs, parents)
    lanes = {run.name: number for number, run in enumerate(order)}
    last = max(run.last_step for run in runs)
    with style():
        figure = new_figure(10.0, 0.9 + LANE * len(order))
        axes = figure.subplots()
        for run in order:
            lane, colour = lanes[run.name], COLOURS[lanes[run.name] % len(COLOURS)]
            begin = began(run)
            first = int(begin["step"]) if begin is not None and run.name in parents else run.metrics[0]["step"] - 1
            axes.plot([first, run.last_step], [lane, lane], color=colour, linewidth=3, solid_capstyle="round")
            if run.name in parents:
                axes.plot([first, first], [lanes[parents[run.name]], lane], color=colour, linewidth=1.2)
            white = [withStroke(linewidth=3, foreground="white")]
            text = label(words(run, begin), 80)
            axes.annotate(text, (first, lane), xytext=(6, 5), textcoords="offset points", fontsize=9, color=INK, path_effects=white)
        axes.set_ylim(len(order) - 0.4, -0.8)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        step_axis(axes, last)
        axes.set_xlabel("step", color=GREY)
    return figure


def began(run: RunData) -> Row | None:
    """The event with which a branch began."""
    return next((event for event in run.events if event["event"] == "branch"), None)


def words(run: RunData, begin: Row | None) -> str:
    """The run's name, what it changed, and its last loss."""
    changes = begin.get("changes") if begin is not None else None
    told = ", ".join(f"{key} {value}" for key, value in changes.items()) if isinstance(changes, dict) else ""
    loss = run.series("loss")[1]
    end = f"loss {fixed(float(loss[-1]), 4)}" if len(loss) and math.isfinite(loss[-1]) else ""
    return " · ".join(part for part in (run.name, told, end) if part)


def _ordered(runs: Sequence[RunData], parents: dict[str, str]) -> list[RunData]:
    """Each run followed by its branches, earlier branches first."""
    found: list[RunData] = []

    def add(run: RunData) -> None:
        found.append(run)
        mine = [r for r in runs if parents.get(r.name) == run.name]
        for child in sorted(mine, key=lambda r: r.metrics[0]["step"]):
            add(child)

    for run in runs:
        if run.name not in parents:
            add(run)
    return found
