"""Shared by all figures: style, colours, untrusted text, and export to SVG and PNG.

Figures are made without pyplot, so no figure, backend or setting outlives a call.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Okabe and Ito's colours, which colour-blind readers can distinguish; without yellow, too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GREY, PALE, HALO = "#222222", "#6f6f6f", "#e8e8e8", "#c6cacf"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9a9a9a",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "xtick.color": "#9a9a9a",
    "ytick.color": "#9a9a9a",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    # Text as outlines looks the same everywhere; a phone's own font would make labels collide.
    "svg.fonttype": "path",
    # Makes the same runs give the same page, byte for byte.
    "svg.hashsalt": "megascale",
}


@contextmanager
def style() -> Iterator[None]:
    """The settings of all figures; also needed while saving, when some are read."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Characters that the font lacks become boxes in the picture; the page's text has the name as well.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, without a backend, whose layout makes room for its contents."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.07))


def label(text: str, limit: int = 48) -> str:
    """Text from a run for a figure: without TeX, control characters or hidden legend entries, and of bounded length."""
    clean = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    clean = " ".join(clean.split()).replace("$", r"\$")
    clean = clean if len(clean) <= limit else clean[: limit - 1] + "…"
    return " " + clean if clean.startswith("_") else clean


def text_width(figure: Figure, text: str, size: float, weight: str = "normal") -> float:
    """Width of `text` in inches."""
    probe = figure.text(0, 0, text, fontsize=size, weight=weight)
    width = probe.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width / figure.dpi
    probe.remove()
    return float(width)


def pack(spans: Sequence[tuple[float, float]], space: float) -> list[int]:
    """The row of every (left, width), in the order of their left ends, so that no two in a row are closer than `space`."""
    ends: list[float] = []
    rows = []
    for left, width in spans:
        row = next((i for i, end in enumerate(ends) if left >= end + space), len(ends))
        ends[row : row + 1] = [left + width]
        rows.append(row)
    return rows


def heading(figure: Figure, title: str | None, handles: Sequence[Artist], size: float) -> None:
    """A title above a legend of as many columns as fit, above all axes; the figure grows by their height."""
    if not title and not handles:
        return
    wide, tall = figure.get_size_inches()
    for columns in range(max(1, len(handles)), 0, -1):
        legend = figure.legend(
            handles=list(handles),
            loc="outside upper left",
            ncols=columns,
            fontsize=size,
            title=title,
            title_fontproperties={"size": size + 2, "weight": "bold"},
            alignment="left",
            borderpad=0,
            borderaxespad=0.8,
            labelspacing=0.35,
            columnspacing=1.8,
        )
        box = legend.get_window_extent(FigureCanvasAgg(figure).get_renderer())
        if box.width <= 0.97 * figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_size_inches(wide, tall + box.height / figure.dpi + 0.1)


def step_axis(axes: Axes, last: float, ticks: int = 7) -> None:
    """Whole steps from 0 to the last one, thousands separated."""
    axes.set_xlim(0, max(1.0, last) * 1.012)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=(1, 2, 2.5, 5, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def svg(figure: Figure, description: str = "") -> str:
    """The figure as an inline SVG element that does not interfere with others on one page.

    Comments, metadata and the names of groups are dropped: nothing refers to them, and figures would repeat them.
    """
    out = io.StringIO()
    with style():
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"\n\s*", "\n", text)
    name = re.sub(r'[<>&"]', " ", description)
    return text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def png(figure: Figure, path: Path) -> None:
    """Saves the figure at 120 pixels per inch."""
    with style():
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
