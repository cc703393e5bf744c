"""Draws results/ranks.json: python -m benchmarks.scale.draw docs/scale.png"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

from megascale.report.canvas import COLOURS, GREY, new_figure, png, style

RESULTS = Path(__file__).parent / "results" / "ranks.json"
ONCE, EVERY = ("first_save_joins", "index_is_written"), ("index_is_read", "resume_plans")
Curve = tuple[str, list[float]]


def curves(ranks: dict[str, Any], layout: str) -> tuple[list[Curve], list[Curve]]:
    """(label, seconds by number of ranks) of the first rank's work, and of every rank's."""
    saved = [row[f"checkpoint of {layout}"] for row in ranks.values()]
    beats = [row["start"]["heartbeats_once"] / row["start"]["heartbeat_every_seconds"] for row in ranks.values()]
    first = [
        ("the first save's plan and index", [sum(row[key] for key in ONCE) for row in saved]),
        ("comparing copies, each save", [row["each_save_compares_copies"] for row in saved]),
        ("the roll call at the start", [row["start"]["roll_call"] for row in ranks.values()]),
        ("heartbeats, each second", beats),
    ]
    every = [
        ("reading the index at a resume", [row["index_is_read"] for row in saved]),
        ("planning what to read", [row["resume_plans"] for row in saved]),
        ("saying what it holds", [row["rank_says_what_it_holds"] for row in saved]),
        ("finding the first batch", [max(1e-5, row["samples"]["first_batch"]) for row in ranks.values()]),
    ]
    return first, every


def draw(path: Path) -> None:
    ranks = json.loads(RESULTS.read_text())["ranks"]
    counts = [int(n) for n in ranks]
    with style():
        figure = new_figure(10.5, 3.9)
        for axes, title, found in zip(
            figure.subplots(1, 2, sharey=True), ("The first rank", "Every rank"), curves(ranks, "405B, tp 8, pp 16"), strict=True
        ):
            axes.set_xscale("log")
            axes.set_yscale("log")
            for (label, seconds), colour in zip(found, COLOURS):
                axes.plot(counts, seconds, "o-", color=colour, markersize=4, label=label)
            linear = [found[0][1][0] * n / counts[0] for n in counts]
            axes.plot(counts, linear, "--", color=GREY, linewidth=0.9, label="linear in ranks")
            axes.xaxis.set_major_locator(FixedLocator(counts))
            axes.xaxis.set_major_formatter(FixedFormatter([f"{n:,}" for n in counts]))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} s"))
            axes.set_title(title, loc="left", fontsize=11)
            axes.set_xlabel("ranks")
            axes.legend(fontsize=8.5, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
        png(figure, path)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
