"""Figures of runs. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megascale.report.read import RunData, gap

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#8a8a8a"
MARKED = {"signal": "signal", "stop": "stopped", "skip": "skipped", "growth": "grown", "change": "changed"}
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def loss_figure(runs: list[RunData], title: str | None = None) -> Figure:
    """Loss of all runs; with several, |Δ| against the last one beneath, on a log axis."""
    with plt.rc_context(STYLE):
        several = len(runs) > 1
        figure, axes = plt.subplots(
            2 if several else 1,
            1,
            figsize=(10, 6.4 if several else 5),
            sharex=True,
            gridspec_kw={"height_ratios": [3, 1]} if several else None,
            squeeze=False,
        )
        top: Axes = axes[0][0]
        colour = 0
        if several:
            steps, loss = runs[-1].series("loss")
            top.plot(
                steps,
                loss,
                color="#c9c9c9",
                linewidth=5,
                label=f"{runs[-1].name}: {_layout(runs[-1])}",
                solid_capstyle="round",
            )
        for run in runs[:-1] if several else runs:
            colour = _draw_run(top, run, colour)
        entropy = next((r.entropy for r in runs if r.entropy is not None), None)
        if entropy is not None:
            top.axhline(entropy, color="black", linestyle=(0, (4, 3)), linewidth=1)
            right = max(r.metrics[-1]["step"] for r in runs)
            top.annotate(
                f"unigram entropy {entropy:.2f}",
                (right, entropy),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                fontsize=9.5,
            )
        top.set_ylabel("loss (nats per token)")
        top.legend(loc="upper right")
        if title:
            top.set_title(title, loc="left", fontweight="bold")
        bottom: Axes = axes[-1][0]
        if several:
            _draw_gaps(bottom, runs)
        bottom.set_xlabel("step")
        bottom.set_xlim(left=0)
        figure.tight_layout()
    return figure


def _draw_run(axes: Axes, run: RunData, colour: int) -> int:
    """One run, coloured by the layout of each stretch; validation as dots. Returns the next free colour."""
    steps, loss = run.series("loss")
    starts = run.starts or [{"step": 0, "layout": run.name}]
    for i, start in enumerate(starts):
        end = starts[i + 1]["step"] if i + 1 < len(starts) else np.inf
        inside = (steps > start["step"]) & (steps <= end)
        paint = COLOURS[colour % len(COLOURS)]
        verb = "start" if i == 0 else f"resumed at step {start['step']}"
        axes.plot(
            steps[inside],
            loss[inside],
            color=paint,
            linewidth=1.4,
            label=f"{run.name}, {verb}: {start.get('layout', '?')}",
        )
        if i > 0:
            axes.axvline(start["step"], color=paint, linewidth=0.9, linestyle=":")
        colour += 1
    for name in run.nested("valid_loss"):
        at, value = run.series("valid_loss", name)
        axes.plot(at, value, "o", color="black", markersize=4, label=f"{run.name}, validation on {name}")
    for event in run.events:
        if event["event"] in MARKED:
            axes.axvline(event["step"], color=GREY, linewidth=0.8, linestyle="--")
            axes.annotate(
                MARKED[event["event"]],
                (event["step"], 0.02),
                xycoords=("data", "axes fraction"),
                rotation=90,
                fontsize=8,
                color=GREY,
            )
    return colour


def _draw_gaps(axes: Axes, runs: list[RunData]) -> None:
    floor = 1e-9
    largest = 0.0
    for i, run in enumerate(runs[:-1]):
        steps, delta = gap(run, runs[-1])
        if len(steps):
            largest = max(largest, float(np.nanmax(delta)))
            axes.semilogy(steps, np.maximum(delta, floor), ".", color=COLOURS[i % len(COLOURS)], markersize=3.5)
    axes.set_ylabel("|Δ loss|")
    axes.set_title(f"distance to {runs[-1].name}: at most {largest:.1e}; {floor:.0e} stands for equal", loc="left", fontsize=10)


def _layout(run: RunData) -> str:
    return " → ".join(str(s.get("layout", "?")) for s in run.starts) or "layout not recorded"


def lines_figure(runs: list[RunData], keys: tuple[str, ...], label: str, log: bool = False, scale: float = 1.0) -> Figure | None:
    """One metric of all runs over steps, or None where no run has it."""
    drawn = []
    for i, run in enumerate(runs):
        steps, values = run.series(*keys)
        if len(steps) and not np.isnan(values).all():
            drawn.append((steps, values * scale, run.name, COLOURS[i % len(COLOURS)]))
    if not drawn:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5, 2.7))
        for steps, values, name, colour in drawn:
            axes.plot(steps, values, color=colour, linewidth=1.2, label=name)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_title(label, loc="left", fontsize=11)
        if len(drawn) > 1:
            axes.legend(fontsize=8.5)
        figure.tight_layout()
    return figure


def traffic_figure(run: RunData) -> Figure | None:
    """Bytes sent a step by mesh axis, stacked."""
    names = run.nested("sent_bytes")
    if not names:
        return None
    steps = np.array([r["step"] for r in run.metrics], float)
    amounts = [np.array([(r.get("sent_bytes") or {}).get(n) or 0 for r in run.metrics], float) / 1e6 for n in names]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5, 2.7))
        axes.stackplot(steps, *amounts, labels=names, colors=COLOURS[: len(names)], step="mid")
        axes.set_title(f"MB sent a step by the busiest rank: {run.name}", loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8.5, loc="lower right")
        figure.tight_layout()
    return figure


def svg(figure: Figure) -> str:
    """The figure as an inline SVG element."""
    out = io.StringIO()
    figure.savefig(out, format="svg")
    plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]


def png(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
