"""Draws the faults of a chain over the unchanged loss curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megascale.chaos.chain import Attempt
from megascale.report.canvas import COLOURS, GREY, new_figure, png, step_axis, style

Curve = Sequence[tuple[int, float | None]]


def draw(expected: Curve, found: Curve, attempts: Sequence[Attempt], path: Path) -> None:
    """Above, the loss of both runs with a tick for every fault; below, the distance between the curves."""
    with style():
        figure = new_figure(9, 5.2)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        then, now = dict(expected), dict(found)
        steps = sorted(then)
        values = np.array([np.nan if then[s] is None else then[s] for s in steps], float)
        others = np.array([np.nan if now.get(s) is None else now[s] for s in steps], float)
        upper.plot(steps, values, color=GREY, linewidth=4, alpha=0.45, label="undisturbed")
        upper.plot(steps, others, color=COLOURS[0], linewidth=1.2, label="disturbed")
        for label, colour, at, height in (
            ("fault of a process", COLOURS[1], [step for a in attempts for _, step in a.process_faults], 0.06),
            ("fault of a file", COLOURS[2], [a.before for a in attempts if a.file_fault], 0.03),
        ):
            if at:
                upper.vlines(at, 0, height, colour, transform=upper.get_xaxis_transform(), linewidth=1.4, label=f"{label} ({len(at)})")
        upper.set_ylabel("loss")
        upper.legend(loc="upper right")
        with np.errstate(invalid="ignore", divide="ignore"):
            lower.plot(steps, np.abs(others - values) / np.abs(values), color=COLOURS[0], linewidth=1.2)
        lower.set_ylabel("relative\ndifference")
        lower.set_xlabel("step")
        lower.set_ylim(bottom=0)
        step_axis(lower, max(steps, default=1))
        png(figure, path)
