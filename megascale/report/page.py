"""One self-contained HTML page about one or several runs: no network, no script, readable on a phone and on paper."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from megascale.report.canvas import svg
from megascale.report.goodput import goodput_figure, goodput_table
from megascale.report.loss import NARROW, loss_figure
from megascale.report.panels import heat_figure, lines_figure, traffic_figure
from megascale.report.read import Row, RunData, as_number
from megascale.report.summary import headline, highlights, verdict
from megascale.report.tree import tree_figure
from megascale.report.words import plain

# If there are more events than this, they are folded away, and events that come by the hundred appear only in the fold.
EVENTS_SHOWN = 40
UNEVENTFUL = ("save", "saved", "skip")


@dataclass(frozen=True)
class Table:
    """Cells as text; the columns `numbers` are right-aligned, and with `named` the first cell of a row is its heading."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    named: bool = True


@dataclass(frozen=True)
class Events:
    """Event tables: rows shown at once, rows in a fold, and their number; None for a table that is not needed."""

    shown: Table | None
    folded: Table | None
    count: int


@dataclass(frozen=True)
class ConfigKeys:
    """All keys, those that differ between several runs, and whether one of these was resumed; None without any."""

    keys: Table | None
    differing: Table | None
    resumed: bool


def page(runs: Sequence[RunData], title: str) -> str:
    """The whole page. The template escapes everything that comes from a run; only figures are markup."""
    several = len(runs) > 1
    content = {
        "title": title,
        "css": Markup(_resource("page.css")),
        "first": {"run": runs[0].name if several else None, "facts": highlights(runs[0])},
        "verdicts": verdict(runs) if several else [],
        "loss": _loss(runs),
        "tree": _drawn(("tree of the runs", tree_figure(runs))),
        "numbers": headline_table(runs),
        "speed": _drawn(
            ("tokens per second", lines_figure(runs, "tokens_per_second", "tokens per second")),
            ("seconds per step", lines_figure(runs, "step_seconds", "seconds per step")),
            ("seconds waiting for data", lines_figure(runs, "data_seconds", "seconds per step waiting for data")),
            ("MFU", lines_figure(runs, "mfu", "MFU, % of the ranks' peak", scale=100)),
            ("memory", lines_figure(runs, "memory_bytes", "memory of rank 0, GB", scale=1e-9)),
            *((f"bytes sent by {run.name}", traffic_figure(run, titled=several)) for run in runs),
        ),
        "layers": [(head, parts) for head, group, readings in LAYERS if (parts := _layers(runs, group, readings))],
        "time": _time(runs),
        "optimization": _drawn(
            ("gradient norm", lines_figure(runs, "grad_norm", "global gradient norm", log=True)),
            ("learning rate", lines_figure(runs, "lr", "learning rate")),
        ),
        "evaluations": _drawn(*((" ".join(keys[1:]), lines_figure(runs, keys, ": ".join(keys[1:]))) for keys in evaluations(runs))),
        "events": events_of(runs),
        "config": config_of(runs),
    }
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(_resource("page.html.jinja")).render(content) + "\n"


def evaluations(runs: Sequence[RunData]) -> list[tuple[str, str, str]]:
    """The keys of every number that an evaluation of any run gave."""
    found = [(r.get("evaluate") or {}) for run in runs for r in run.metrics]
    return list(
        dict.fromkeys(
            ("evaluate", name, key)
            for row in found
            if isinstance(row, dict)
            for name, numbers in row.items()
            if isinstance(numbers, dict)
            for key in numbers
        )
    )


def headline_table(runs: Sequence[RunData]) -> Table:
    """A column per run, a row per fact that any of them has."""
    columns = [headline(run) for run in runs]
    labels = [k for k in dict.fromkeys(k for c in columns for k in c) if k != "end"] + ["end"]
    return Table(["", *(r.name for r in runs)], [[k, *(c.get(k, "") for c in columns)] for k in labels])


def events_of(runs: Sequence[RunData]) -> Events:
    """Events in the order written; many uneventful rows are folded away."""
    rows = [(run, event) for run in runs for event in run.events]
    several = len(runs) > 1
    head = (["run"] if several else []) + ["time (UTC)", "step", "event", "details"]

    def table(chosen: Sequence[tuple[RunData, Row]]) -> Table | None:
        names = [[run.name] if several else [] for run, _ in chosen]
        cells = [[*name, _when(e), f"{e['step']:,}", e["event"], _details(e)] for name, (_, e) in zip(names, chosen)]
        return Table(head, cells, frozenset({len(head) - 3}), named=several) if cells else None

    if len(rows) <= EVENTS_SHOWN:
        return Events(table(rows), None, len(rows))
    telling = [(run, e) for run, e in rows if e["event"] not in UNEVENTFUL]
    return Events(table(telling) if len(telling) <= EVENTS_SHOWN else None, table(rows), len(rows))


def config_of(runs: Sequence[RunData]) -> ConfigKeys:
    """All config keys, and for several runs those that differ."""
    keys = list(dict.fromkeys(k for r in runs for k in r.config))
    rows = [[k, *(plain(r.config[k]) if k in r.config else "" for r in runs)] for k in keys]
    head = ["key", *(r.name for r in runs)]
    differing = Table(head, [row for row in rows if len(set(row[1:])) > 1]) if len(runs) > 1 else None
    return ConfigKeys(Table(head, rows) if keys else None, differing, any(len(r.starts) > 1 for r in runs))


EXPERTS = {
    "load_max_over_mean": "busiest expert's load ÷ mean",
    "load_entropy": "entropy of the load, 1 when even",
    "dropped_share": "share of assignments dropped",
    "aux_loss": "auxiliary loss per token",
    "z_loss": "router z-loss per token",
    "router_logits": "largest router logit",
}


CASTS = {
    "input_vanished": "share of inputs that become zero in FP8",
    "gradient_vanished": "share of gradients that become zero in FP8",
    "input_clamped": "share of inputs beyond FP8's largest",
    "gradient_clamped": "share of gradients beyond FP8's largest",
}


LAYERS = (("Experts", "experts", EXPERTS), ("FP8 casts, the worst product of each layer", "fp8", CASTS))


def _layers(runs: Sequence[RunData], group: str, readings: Mapping[str, str]) -> list[dict[str, Any]]:
    """Figures of a group's module metrics by layer and step, for the runs that have some."""
    parts = []
    for run in runs:
        named = ((f"{title} of {run.name}, by layer", heat_figure(run, group, key, title)) for key, title in readings.items())
        if figures := _drawn(*named):
            parts.append({"run": run.name if len(runs) > 1 else None, "figures": figures})
    return parts


def _time(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Sections about where the time went, for the runs that record it."""
    return [
        {
            "run": run.name if len(runs) > 1 else None,
            "figure": _markup(figure, f"time of {run.name} by attempt"),
            "table": Table(["", "time", "share", ""], goodput_table(run), frozenset({1, 2})),
        }
        for run in runs
        if (figure := goodput_figure(run)) is not None
    ]


def _loss(runs: Sequence[RunData]) -> dict[str, Markup]:
    description = "Loss over steps of " + ", ".join(r.name for r in runs)
    return {"broad": _markup(loss_figure(runs), description), "narrow": _markup(loss_figure(runs, look=NARROW), description)}


def _drawn(*figures: tuple[str, Figure | None]) -> list[Markup]:
    return [_markup(figure, f"{name} over steps") for name, figure in figures if figure is not None]


def _markup(figure: Figure, description: str) -> Markup:
    return Markup(svg(figure, description))


def _resource(name: str) -> str:
    return files("megascale.report").joinpath(name).read_text(encoding="utf-8")


def _when(event: Row) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(as_number(event.get("time"))))
    except (ValueError, OverflowError, OSError):
        return ""  # no time, or not a valid one


def _details(event: Row) -> str:
    """Other keys as "key value", changes as "key: old → new"."""
    parts = []
    for key, value in event.items():
        if key in ("time", "step", "event", "began", "last_seen") or value in (None, "", [], {}):
            continue
        if key == "changes" and isinstance(value, dict):
            parts += [f"{k}: {' → '.join(map(plain, v)) if isinstance(v, list) else plain(v)}" for k, v in value.items()]
        else:
            parts.append(f"{key} {plain(value)}")
    return ", ".join(parts)
