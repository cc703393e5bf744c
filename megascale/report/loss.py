"""The loss figure: one continuous curve, coloured by layout, over the undisturbed run, and below it the distance between the two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from megascale.report.canvas import COLOURS, GREY, HALO, INK, heading, label, new_figure, pack, step_axis, style, text_width
from megascale.report.read import Array, RunData
from megascale.report.series import Gap, Segment, gap, markers, segments, smooth, thin
from megascale.report.words import count, scientific

SHAPES = "osD^v"
FULL_DETAIL = 400  # points up to which every step of a compared curve is visible; beyond, its mean is drawn over it


@dataclass(frozen=True)
class Look:
    """Sizes in inches and points, for two renderings: page or picture, and phone."""

    width: float
    top: float  # height of the curve including labels
    bottom: float  # height of the distance
    size: float
    ticks: int


WIDE = Look(10.0, 3.8, 1.9, 10.5, 8)
NARROW = Look(4.6, 3.6, 1.9, 9.5, 4)


@dataclass(frozen=True)
class Stretch:
    run: RunData
    segment: Segment
    colour: str


def loss_figure(runs: Sequence[RunData], title: str | None = None, look: Look = WIDE) -> Figure:
    """Loss of all runs; with several, |Δ| to the last one below, on a log axis with the same steps."""
    reference = runs[-1] if len(runs) > 1 else None
    shown = list(runs[:-1]) if reference else list(runs)
    stretches = _colours(shown)
    last = max(1, *(r.last_step for r in runs))
    with style():
        figure = new_figure(look.width, look.top + (look.bottom if reference else 0))
        heading(figure, title and label(title, 90), _handles(shown, reference, stretches), look.size)
        top, lowest = figure.subplots(2, 1, sharex=True, height_ratios=(look.top, look.bottom)) if reference else (figure.subplots(),) * 2
        _draw_curves(top, shown, reference, stretches)
        _draw_entropy(top, runs, look)
        top.set_ylabel("loss (nats per token)", fontsize=look.size)
        if reference:
            _draw_gaps(lowest, stretches, reference)
            _write_caption(lowest, _caption(shown, reference, narrow=look is NARROW), look)
        for axes in (top, lowest):
            axes.tick_params(labelsize=look.size - 0.5)
            step_axis(axes, last, look.ticks)
        lowest.set_xlabel("step", fontsize=look.size)
        figure.align_ylabels()
        # Labels along the steps need the final width of the axes.
        figure.draw_without_rendering()
        inner = top.get_position().width * look.width
        _draw_markers(top, shown, last, inner, look)
        if len(shown) == 1:
            _draw_strip(top, stretches, _strip_labels(stretches, last, inner, look), look)
    return figure


def _colours(runs: Sequence[RunData]) -> list[Stretch]:
    """A colour per layout of every run if there are enough colours, else one per run."""
    stretches = [(run, segment) for run in runs for segment in segments(run)]
    by_layout = list(dict.fromkeys((run.name, segment.layout) for run, segment in stretches))
    if len(by_layout) <= len(COLOURS):
        return [Stretch(r, s, COLOURS[by_layout.index((r.name, s.layout))]) for r, s in stretches]
    names = [run.name for run in runs]
    return [Stretch(r, s, COLOURS[names.index(r.name) % len(COLOURS)]) for r, s in stretches]


def _handles(shown: Sequence[RunData], reference: RunData | None, stretches: Sequence[Stretch]) -> list[Line2D]:
    """Legend entries. A single run's layouts are labelled above its curve instead."""
    handles: list[Line2D] = []
    if len(shown) == 1:
        handles.append(Line2D([], [], color=stretches[0].colour, linewidth=1.8, label=label(shown[0].name)))
    else:
        per_run = {s.colour: [t.segment.words for t in stretches if t.colour == s.colour] for s in stretches}
        for colour, words in per_run.items():
            names = dict.fromkeys(t.run.name for t in stretches if t.colour == colour)
            text = f"{', '.join(names)}: {', '.join(dict.fromkeys(words))}"
            handles.append(Line2D([], [], color=colour, linewidth=1.8, label=label(text, 64)))
    if reference:
        handles.append(Line2D([], [], color=HALO, linewidth=5, label=label(f"{reference.name} (reference)")))
    for shape, name in zip(SHAPES, _sets(shown)):
        handles.append(_dots([], [], shape, label(f"validation: {name}")))
    return handles


def _sets(runs: Sequence[RunData]) -> list[str]:
    return sorted({name for run in runs for name in run.nested("valid_loss")})


def _dots(x: Sequence[float] | Array, y: Sequence[float] | Array, shape: str, name: str) -> Line2D:
    return Line2D(x, y, linestyle="", marker=shape, markersize=5.5, markerfacecolor="white", markeredgecolor=INK, label=name)


def _draw_curves(axes: Axes, shown: Sequence[RunData], reference: RunData | None, stretches: Sequence[Stretch]) -> None:
    """Single steps if distinguishable, else pale below their running mean. The reference is a broad grey line below all."""
    if reference:
        steps, loss = reference.series("loss")
        values = loss if len(loss) <= FULL_DETAIL else smooth(loss)
        axes.plot(*thin(steps, values), color=HALO, linewidth=5, solid_capstyle="round", solid_joinstyle="round", zorder=1.5)
    for number, run in enumerate(shown):
        steps, loss = run.series("loss")
        # Coinciding curves would hide each other: all but the first are dashed, with different phases.
        dash = (6.0 * number, (6.0, 6.0 * (len(shown) - 1))) if number else "-"
        detailed = len(loss) <= (FULL_DETAIL if reference else 30)
        mean = loss if detailed else smooth(loss)
        for stretch in (s for s in stretches if s.run is run):
            # A stretch begins at the last step of the one before, so that the curve has no gap where the layout changes.
            inside = (steps >= stretch.segment.first - 1) & (steps <= stretch.segment.last)
            if not detailed:
                axes.plot(*thin(steps[inside], loss[inside]), color=stretch.colour, linewidth=0.7, alpha=0.35, zorder=2)
            curve = axes.plot(*thin(steps[inside], mean[inside]), color=stretch.colour, linewidth=1.7, linestyle=dash, zorder=2.5)
            if inside.sum() < 2:
                curve[0].set_marker(".")  # one point makes no line
        for shape, name in zip(SHAPES, _sets(shown)):
            axes.add_line(_dots(*run.series("valid_loss", name), shape, label(name))).set_zorder(3)
    axes.relim()
    axes.autoscale_view()
    if not any(np.isfinite(r.series("loss")[1]).any() for r in (*shown, *([reference] if reference else []))):
        axes.text(0.5, 0.5, "no finite loss yet", transform=axes.transAxes, ha="center", color=GREY)


def _draw_entropy(axes: Axes, runs: Sequence[RunData], look: Look) -> None:
    entropy = next((r.entropy for r in runs if r.entropy is not None), None)
    if entropy is None:
        return
    axes.axhline(entropy, color=INK, linestyle=(0, (5, 3)), linewidth=0.9, zorder=1.8)
    words = f"unigram entropy {entropy:.2f}"
    white = [withStroke(linewidth=3, foreground="white")]
    axes.annotate(
        words,
        (0.995, entropy),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3.5),
        textcoords="offset points",
        ha="right",
        fontsize=look.size - 1,
        path_effects=white,
        zorder=4,
    )


def _draw_markers(axes: Axes, shown: Sequence[RunData], last: int, inner: float, look: Look) -> None:
    """Labelled vertical lines; neighbours that would overlap share a label."""
    near = 1.9 * look.size / 72 / inner * last
    everything = sorted((m for run in shown for m in markers(run, near)), key=lambda m: m.step)
    labelled = -math.inf
    for marker in everything:
        axes.axvline(marker.step, color=GREY, linewidth=0.9, linestyle=":" if marker.resumed else (0, (3, 2)), zorder=1.2)
        if marker.step - labelled < near:
            continue  # another run's events at the same steps; the table has them all
        labelled = marker.step
        at_edge = marker.step < near
        axes.annotate(
            label(marker.text, 24 if look is NARROW else 40),
            (marker.step, 0.985),
            xycoords=axes.get_xaxis_transform(),
            xytext=(3.5 if at_edge else -3.5, 0),
            textcoords="offset points",
            rotation=90,
            ha="left" if at_edge else "right",
            va="top",
            fontsize=look.size - 2,
            color=GREY,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=4,
        )


StripLabel = tuple[float, str, str, int]  # left end as a share of the width, words, colour, row


def _strip_labels(stretches: Sequence[Stretch], last: int, inner: float, look: Look) -> list[StripLabel]:
    """Positions of the layouts' names above the curve; neighbours with the same layout share one."""
    probe = new_figure(look.width, 1)
    found: list[tuple[float, float, str, str]] = []
    for i, stretch in enumerate(stretches):
        if i and stretches[i - 1].segment.layout == stretch.segment.layout:
            continue
        words = label(stretch.segment.words, 90)
        if text_width(probe, words, look.size, "bold") > inner:
            words = label(stretch.segment.layout, 40)
        width = text_width(probe, words, look.size, "bold")
        left = min((stretch.segment.first - 1) / (last * 1.012) * inner, max(inner - width, 0.0))
        found.append((left, width, words, stretch.colour))
    found.sort()
    rows = pack([(left, width) for left, width, *_ in found], 0.12)
    return [(left / inner, words, colour, row) for (left, _, words, colour), row in zip(found, rows)]


def _draw_strip(axes: Axes, stretches: Sequence[Stretch], labels: Sequence[StripLabel], look: Look) -> None:
    """A bar above the curve that shows which layout ran which steps."""
    across = axes.get_xaxis_transform()
    for stretch in stretches:
        bounds = (stretch.segment.first - 1, stretch.segment.last)
        axes.plot(bounds, (1.015, 1.015), color=stretch.colour, linewidth=4, transform=across, clip_on=False, solid_capstyle="butt")
    for left, words, colour, row in labels:
        axes.annotate(
            words,
            (left, 1.015),
            xycoords="axes fraction",
            xytext=(0, 5 + row * look.size * 1.5),
            textcoords="offset points",
            color=colour,
            fontsize=look.size,
            weight="bold",
            annotation_clip=False,
        )


def _caption(shown: Sequence[RunData], reference: RunData, narrow: bool) -> list[str]:
    """Text with the largest distance, and how many steps are equal."""
    gaps = [gap(run, reference) for run in shown]
    steps = sum(len(g.steps) for g in gaps)
    if not steps:
        return [f"|Δ loss| to {label(reference.name, 30)}: no steps in common"]
    largest = max(g.largest for g in gaps if len(g.steps))
    name = label(reference.name, 24 if narrow else 40)
    first = f"|Δ loss| to {name}: " + (f"at most {scientific(largest)}" if largest else "none")
    rest = f"{sum(g.equal for g in gaps):,} of {count(steps, 'compared step')} equal to the last digit"
    one_sided = sum(g.one_sided for g in gaps)
    if one_sided:
        rest += f"; {count(one_sided, 'step')} finite in one run only"
    return [first, rest]


def _write_caption(axes: Axes, lines: Sequence[str], look: Look) -> None:
    """Writes the caption above the axes, first part in bold: side by side if there is room, else on two lines."""
    probe = new_figure(look.width, 1)
    x, y = 0.0, 5 + (len(lines) - 1) * look.size * 1.45 if look is NARROW else 5.0
    for i, line in enumerate(lines):
        weight, colour = ("normal", GREY) if i else ("bold", INK)
        place: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (x, y), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(line, (0, 1), fontsize=look.size, weight=weight, color=colour, **place)
        if look is NARROW:
            y -= look.size * 1.45
        else:
            x += 72 * text_width(probe, line, look.size, weight) + 12


def _draw_gaps(axes: Axes, stretches: Sequence[Stretch], reference: RunData) -> None:
    """Every distance as a dot on a log axis; equal steps, which have no logarithm, in their own band at the bottom."""
    gaps = {s.run.name: gap(s.run, reference) for s in stretches}
    positive = np.concatenate([g.delta[g.delta > 0] for g in gaps.values()])
    low, high = (math.floor(math.log10(positive.min())), math.ceil(math.log10(positive.max()))) if len(positive) else (-8, -6)
    high = max(high, low + 1)
    unit = (high - low) / 4  # height in decades of the band for equality
    ground = 10.0 ** (low - unit)
    axes.set_yscale("log")
    axes.axhspan(10.0 ** (low - 1.7 * unit), 10.0 ** (low - 0.3 * unit), color="#f4f4f4", linewidth=0, zorder=0.5)
    for stretch in stretches:
        steps, delta = _within(gaps[stretch.run.name], stretch.segment)
        steps, delta = thin(steps, delta, 900)
        axes.plot(steps, np.maximum(delta, ground), ".", color=stretch.colour, markersize=4 if len(delta) < FULL_DETAIL else 2.5, zorder=2)
    axes.set_ylim(10.0 ** (low - 1.7 * unit), 10.0 ** (high + 0.12 * (high - low)))
    each = max(1, math.ceil((high - low) / 4))
    decades = [10.0**d for d in range(low, high + 1, each)]
    axes.yaxis.set_major_locator(FixedLocator([ground, *decades]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: "equal" if y == ground else scientific(y, 0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("|Δ loss|")


def _within(found: Gap, segment: Segment) -> tuple[Array, Array]:
    inside = (found.steps >= segment.first) & (found.steps <= segment.last)
    return found.steps[inside], found.delta[inside]
