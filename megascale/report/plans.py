"""Pictures of what `megascale plan` finds over numbers of GPUs, and of a simulated job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.ticker import NullFormatter

from megascale.planning.scale import METHODS, NAMES
from megascale.report.canvas import COLOURS, GREY, new_figure, style


def draw_scale(found: dict[str, Any], file: Path) -> None:
    """Days against GPUs by method, and efficiency of strong and weak scaling, as a PNG."""
    with style():
        figure = new_figure(11, 4)
        days, share = figure.subplots(1, 2)
        for i, name in enumerate(METHODS):
            points = [(r["gpus"], r["days"][name]) for r in found["strong"] if r["days"][name] is not None]
            if points:
                days.plot(*zip(*points, strict=True), color=COLOURS[i], marker="o", ms=4, lw=3.2 - 0.7 * i, label=NAMES[name])
        days.set(xscale="log", yscale="log", ylabel="days, failures not counted")
        days.legend()
        for i, (rows, name) in enumerate(((found["strong"], "strong: the same batch"), (found["weak"], "weak: the same batch per GPU"))):
            points = [(r["gpus"], 100 * r["efficiency"]) for r in rows if r["best"]]
            share.plot(*zip(*points, strict=True), color=COLOURS[i], marker="o", ms=4, label=name)
        share.set(xscale="log", ylabel="tokens/s per GPU (% of the first)", ylim=(0, 105))
        share.legend(loc="lower left")
        for axis in (days.xaxis, share.xaxis, days.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.4g}")
            axis.set_minor_formatter(NullFormatter())
        counts = [r["gpus"] for r in found["strong"]][:: max(1, len(found["strong"]) // 6)]
        for axes in (days, share):
            axes.set_xticks(counts)
            axes.set_xlabel("GPUs")
        low, high = days.get_ylim()
        ticks = [t for i in range(-3, 9) for t in (10.0**i, 2 * 10.0**i, 5 * 10.0**i) if low <= t <= high]
        days.set_yticks(ticks if len(ticks) > 1 else [low, high])
        figure.savefig(file, dpi=110)


def draw_study(found: dict[str, Any], file: Path) -> None:
    """Goodput by interval, spares and recovery in place, as a PNG: the mean over seeds in a band from the least to the most."""
    with style():
        figure = new_figure(11, 3.6)
        one, two, three = figure.subplots(1, 3, sharey=True)
        rows = found["interval"]
        panels = (
            (one, [r["seconds"] / 60 for r in rows], rows, "minutes between saves"),
            (two, [r["spares"] for r in found["spares"]], found["spares"], "spare nodes"),
            (three, [100 * r["share"] for r in found["in_place"]], found["in_place"], "failures recovered in place (%)"),
        )
        for axes, x, part, name in panels:
            axes.fill_between(x, [100 * r["least"] for r in part], [100 * r["most"] for r in part], color=COLOURS[0], alpha=0.18, lw=0)
            axes.plot(x, [100 * r["goodput"] for r in part], color=COLOURS[0], marker="o", ms=4, label="simulated")
            axes.set_xlabel(name)
        known = [(r["seconds"] / 60, 100 * r["closed_form"]) for r in rows if r["closed_form"] is not None]
        one.plot(*zip(*known, strict=True), color=GREY, ls="--", label="closed form")
        one.set(xscale="log", ylabel="goodput (%)")
        one.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        one.legend(loc="lower left")
        figure.savefig(file, dpi=110)
