"""The small figures: one quantity each over the steps of all runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from megascale.report.canvas import COLOURS, GREY, heading, label, new_figure, step_axis, style
from megascale.report.read import Array, Row, RunData, as_number
from megascale.report.series import markers, smooth, thin
from megascale.report.words import scientific
from megascale.sizes import byte_unit

WIDTH, HEIGHT = 4.6, 2.6  # inches, without the heading
SIZE = 9.5
NOISY = ("tokens_per_second", "step_seconds", "data_seconds", "mfu", "grad_norm")
SMOOTHED_FROM = 60  # points; shorter curves are not smoothed


def lines_figure(runs: Sequence[RunData], key: str | tuple[str, ...], title: str, log: bool = False, scale: float = 1.0) -> Figure | None:
    """One metric of all runs, nested if `key` has several parts, times `scale`, or None if no run has it. The last of several
    runs is the grey reference.
    """
    drawn: list[tuple[RunData, str, Array, Array]] = []
    keys = (key,) if isinstance(key, str) else key
    for i, run in enumerate(runs):
        steps, values = run.series(*keys)
        values = values * scale
        if log:
            values = np.where(values > 0, values, np.nan)
        if np.isfinite(values).any():
            colour = GREY if i and i == len(runs) - 1 else COLOURS[i % len(COLOURS)]
            drawn.append((run, colour, steps, values))
    if not drawn:
        return None
    with style():
        handles = [Line2D([], [], color=c, linewidth=1.6, label=label(r.name, 40)) for r, c, _, _ in drawn] if len(runs) > 1 else []
        figure, axes = _panel(title, handles, max(r.last_step for r in runs))
        # The reference first, so that it is below the others.
        for _, colour, steps, values in sorted(drawn, key=lambda d: d[1] != GREY):
            noisy = len(values) >= SMOOTHED_FROM and key in NOISY
            axes.plot(*thin(steps, values), color=colour, linewidth=0.7 if noisy else 1.5, alpha=0.4 if noisy else 1)
            if noisy:
                # Rare slow steps would distort the mean around them.
                usual = values if log else np.clip(values, *np.nanpercentile(values, (1, 99)))
                axes.plot(*thin(steps, smooth(usual)), color=colour, linewidth=1.6)
        if log:
            _log_axis(axes, np.concatenate([v for *_, v in drawn]))
        else:
            _from_zero(axes, [(s, v) for _, _, s, v in drawn])
        for run in runs if len(runs) == 1 else runs[:-1]:
            _resumes(axes, run)
    return figure


def traffic_figure(run: RunData, titled: bool = False) -> Figure | None:
    """Bytes that the busiest rank sent per step, stacked by mesh axis; None for a run that sent nothing."""
    names = run.nested("sent_bytes")
    rows = _changes([r for r in run.metrics if isinstance(r.get("sent_bytes"), dict)])
    steps = np.array([r["step"] for r in rows], float)
    amounts = [np.array([r["sent_bytes"].get(n) or 0 for r in rows], float) for n in names]
    total = np.sum(amounts, axis=0) if names else np.zeros(1)
    if not total.any():
        return None
    unit, sign = byte_unit(float(total.max()))
    with style():
        hatches = ["" if i < len(COLOURS) else "//" for i in range(len(names))]
        colours = [c for c, _ in zip(cycle(COLOURS), names)]
        handles = [Line2D([], [], color=c, linewidth=6, label=label(n, 24)) for n, c in zip(names, colours)]
        whose = f": {label(run.name, 26)}" if titled else ", busiest rank"
        figure, axes = _panel(f"{sign} sent per step{whose}", handles, run.last_step)
        below = np.zeros(len(steps))
        for amount, colour, hatch in zip(amounts, colours, hatches):
            # A row's bytes apply to the steps since the previous row, as `pre` draws.
            above = below + amount / unit
            axes.fill_between(steps, below, above, step="pre", color=colour, hatch=hatch, linewidth=0, alpha=0.85)
            below = above
        axes.set_ylim(0, float(below.max()) * 1.08)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _resumes(axes, run)
    return figure


def heat_figure(run: RunData, group: str, reading: str, title: str, limit: int = 240) -> Figure | None:
    """A reading of every layer of a group (model/module_metrics.py) as a heat map over steps and layers; None without any.

    A row covers the steps since the previous row; neighbours are averaged into at most `limit` columns.
    """
    rows = [(r["step"], found) for r in run.metrics if (found := _by_layer(r, group, reading))]
    layers = sorted({layer for _, found in rows for layer in found})
    groups = [[rows[i] for i in part] for part in np.array_split(np.arange(len(rows)), max(1, min(limit, len(rows))))]
    values = np.array([[_mean([found.get(layer, np.nan) for _, found in part]) for part in groups] for layer in layers], float)
    if not np.isfinite(values).any():
        return None
    edges = [groups[0][0][0] - 0.5, *(part[-1][0] + 0.5 for part in groups)]
    with style():
        figure, axes = _panel(title, [], run.last_step)
        axes.grid(False)
        places = np.arange(len(layers) + 1) - 0.5
        # As a bitmap: a path per cell would be larger than the rest of the page.
        image = axes.pcolormesh(edges, places, np.ma.masked_invalid(values), cmap="cividis", rasterized=True)
        axes.set_ylabel("layer", fontsize=SIZE)
        shown = range(0, len(layers), -(-len(layers) // 8))
        axes.set_yticks(list(shown), [str(layers[i]) for i in shown])
        step_axis(axes, run.last_step, 5)
        bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06)
        bar.ax.tick_params(labelsize=SIZE - 1.5)
        bar.outline.set_visible(False)  # type: ignore[operator]
        _resumes(axes, run)
    return figure


def _mean(values: Sequence[float]) -> float:
    """The mean of the finite values; NaN without any."""
    known = [v for v in values if np.isfinite(v)]
    return sum(known) / len(known) if known else np.nan


def _by_layer(row: Row, group: str, reading: str) -> dict[int, float]:
    """Layer → reading, the largest if a layer has several modules; empty if the row has no such group, or one that the trainer did not
    write.
    """
    told = row.get(group)
    layers, values = (told.get(key) if isinstance(told, dict) else None for key in ("layers", reading))
    if not (isinstance(layers, list) and isinstance(values, list) and all(isinstance(n, int) for n in layers)):
        return {}
    found: dict[int, float] = {}
    for layer, value in zip(layers, map(as_number, values)):
        found[layer] = max(value, found.get(layer, value))
    return found


def _changes(rows: Sequence[Row], limit: int = 800) -> list[Row]:
    """The first and last row of every plateau of the bytes; evenly thinned if they change all the time."""
    sent = [r["sent_bytes"] for r in rows]
    kept = [r for i, r in enumerate(rows) if i in (0, len(rows) - 1) or sent[i] != sent[i - 1] or sent[i] != sent[i + 1]]
    return kept if len(kept) <= limit else [kept[i] for i in np.linspace(0, len(kept) - 1, limit).astype(int)]


def _panel(title: str, handles: Sequence[Line2D], last: int) -> tuple[Figure, Axes]:
    """One pair of axes with title and legend above them, clear of the curves."""
    figure = new_figure(WIDTH, HEIGHT)
    heading(figure, title, handles, SIZE - 1)
    axes = figure.subplots()
    axes.tick_params(labelsize=SIZE - 0.5)
    axes.set_xlabel("step", fontsize=SIZE)
    step_axis(axes, last, 5)
    return figure, axes


def _from_zero(axes: Axes, curves: Sequence[tuple[Array, Array]]) -> None:
    """A linear axis from zero. Rare points far above the rest, such as a first step that compiles, become arrows at the edge."""
    values = np.concatenate([v[np.isfinite(v)] for _, v in curves])
    usual = float(np.percentile(values, 98))
    top = float(values.max())
    if usual > 0 and top > 3 * usual:
        top = 1.25 * usual
        for steps, v in curves:
            far = np.isfinite(v) & (v > top)
            axes.plot(steps[far], np.full(int(far.sum()), top), "^", color=GREY, markersize=5, clip_on=False)
        # The usual values end below the corner.
        far_up: dict[str, Any] = {"ha": "right", "va": "top", "fontsize": SIZE - 1.5, "color": GREY}
        axes.text(0.99, 0.97, f"▲ up to {scientific(float(values.max()))}", transform=axes.transAxes, **far_up)
        axes.set_ylim(0, top)
    else:
        axes.set_ylim(0, top * 1.08 or 1)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tick(y, axes.get_ylim()[1])))


def _tick(value: float, top: float) -> str:
    if value == 0:
        return "0"
    if top < 2e-3:
        return scientific(value, 1).replace(".0×", "×")
    if top < 1e4:
        return f"{value:,.4g}"
    return f"{value / 1e3:,.4g}k" if top < 1e6 else f"{value / 1e6:,.4g}M"


def _log_axis(axes: Axes, values: Array) -> None:
    """Ticks at decades, and at 2 and 5 between them if the values span little."""
    axes.set_yscale("log")
    known = values[np.isfinite(values)]
    little = known.max() / known.min() < 60
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if little else (1,), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}" if 1e-3 <= y < 1e5 else scientific(y, 0)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _resumes(axes: Axes, run: RunData) -> None:
    for marker in markers(run):
        if marker.resumed:
            axes.axvline(marker.step, color=GREY, linewidth=0.9, linestyle=":", zorder=1.2)
