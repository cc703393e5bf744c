"""One self-contained HTML page about one or several runs."""

from __future__ import annotations

import time
from html import escape
from typing import Any

import numpy as np

from megascale.report.figures import lines_figure, loss_figure, svg, traffic_figure
from megascale.report.read import RunData

CSS = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1060px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em;margin-bottom:.2em} h2{font-size:1.15em;margin-top:2em}
svg{max-width:100%;height:auto} .pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));gap:.5em}
table{border-collapse:collapse;font-size:.92em}
td,th{padding:.25em .8em .25em 0;text-align:left;vertical-align:top;border-bottom:1px solid #e6e6e6}
td.n{text-align:right} .wide{overflow-x:auto}
@media print{details{display:block}}
"""


def page(runs: list[RunData], title: str) -> str:
    """The whole page; everything that comes from a run is escaped."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        headline_table(runs),
        "<h2>Loss</h2>",
        svg(loss_figure(runs)),
        "<h2>Speed and memory</h2>",
        _figures(
            lines_figure(runs, ("tokens_per_second",), "tokens per second"),
            lines_figure(runs, ("mfu",), "MFU, % of the rank's peak", scale=100),
            lines_figure(runs, ("step_seconds",), "seconds a step"),
            lines_figure(runs, ("memory_bytes",), "memory of rank 0, GB", scale=1e-9),
            *(traffic_figure(run) for run in runs),
        ),
        "<h2>Optimization</h2>",
        _figures(
            lines_figure(runs, ("grad_norm",), "global gradient norm", log=True),
            lines_figure(runs, ("lr",), "learning rate"),
        ),
        "<h2>Events</h2>",
        events_table(runs),
        "<h2>Configuration</h2>",
        config_table(runs),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{CSS}</style><body>{body}</body></html>\n"
    )


def headline_table(runs: list[RunData]) -> str:
    """The numbers one asks for first, a column per run."""
    facts: dict[str, list[str]] = {}
    for run in runs:
        last = run.metrics[-1]
        column = {
            "layouts": " → ".join(str(s.get("layout", "?")) for s in run.starts),
            "steps": f"{last['step']:,}",
            "tokens": f"{last.get('tokens') or 0:,}",
            "last loss": _number(last.get("loss"), 4),
            **{f"best validation, {n}": _number(float(np.nanmin(run.series("valid_loss", n)[1])), 4) for n in run.nested("valid_loss")},
            "unigram entropy": _number(run.entropy, 4),
            "tokens/s (median)": _median(run, "tokens_per_second", 1, 0),
            "MFU (median)": _median(run, "mfu", 100, 1, " %"),
            "peak memory": _number(max((r.get("memory_bytes") or 0 for r in run.metrics), default=0) / 1e9, 2, " GB"),
            "ended": escape(f"{run.ending.get('code', '?')}: {run.ending.get('reason', 'still running')}"),
        }
        for axis in run.nested("sent_bytes"):
            column[f"MB sent a step, {axis} (median)"] = _number(float(np.nanmedian(run.series("sent_bytes", axis)[1])) / 1e6, 2)
        for key, value in column.items():
            facts.setdefault(key, [""] * len(runs))[runs.index(run)] = value if key == "ended" else escape(value)
    head = "".join(f"<th>{escape(r.name)}</th>" for r in runs)
    rows = "".join(f"<tr><th>{escape(k)}</th>{''.join(f'<td>{c}</td>' for c in v)}</tr>" for k, v in facts.items())
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'


def events_table(runs: list[RunData]) -> str:
    rows = []
    for run in runs:
        for event in run.events:
            details = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "step", "event") and v not in (None, ""))
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.get("time", 0)))
            cells = (run.name, when, event["step"], event["event"], details)
            rows.append("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in ("run", "time", "step", "event", "details"))
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def config_table(runs: list[RunData]) -> str:
    """Keys that differ between runs first; all of them behind a fold."""
    keys = list(dict.fromkeys(k for r in runs for k in r.config))
    differ = [k for k in keys if len({repr(r.config.get(k)) for r in runs}) > 1]
    head = "".join(f"<th>{escape(r.name)}</th>" for r in runs)

    def table(chosen: list[str]) -> str:
        rows = "".join(
            f"<tr><th>{escape(k)}</th>" + "".join(f"<td>{escape(str(r.config.get(k, '')))}</td>" for r in runs) + "</tr>" for k in chosen
        )
        return f'<div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'

    different = f"<p>What differs:</p>{table(differ)}" if len(runs) > 1 and differ else ""
    return f"{different}<details><summary>all {len(keys)} keys</summary>{table(keys)}</details>"


def _figures(*figures: Any) -> str:
    return '<div class="pair">' + "".join(svg(f) for f in figures if f is not None) + "</div>"


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "" if value is None or value != value else f"{value:,.{digits}f}{unit}"


def _median(run: RunData, key: str, scale: float, digits: int, unit: str = "") -> str:
    values = run.series(key)[1]
    return _number(float(np.nanmedian(values)) * scale, digits, unit) if len(values) and not np.isnan(values).all() else ""
