"""One self-contained HTML page about one or several runs: no network, no script, readable on a phone and on paper."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape

from matplotlib.figure import Figure

from megascale.report.canvas import svg
from megascale.report.goodput import goodput_figure, goodput_table
from megascale.report.loss import NARROW, loss_figure
from megascale.report.panels import heat_figure, lines_figure, traffic_figure
from megascale.report.read import Row, RunData, as_number
from megascale.report.summary import headline, highlights, verdict
from megascale.report.words import plain

# More events than this are folded, and those beside it that come by the hundred are left to the fold.
EVENTS_SHOWN = 40
UNEVENTFUL = ("save", "saved", "skip")

CSS = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:#222;background:#fff;
max-width:1060px;margin:0 auto;padding:1.6em 1.1em 3em}
h1{font-size:1.6em;line-height:1.25;margin:0 0 .6em;overflow-wrap:anywhere}
h2{font-size:1.15em;margin:2.2em 0 .6em;padding-bottom:.25em;border-bottom:1px solid #ddd}
h3{font-size:1em;margin:1.4em 0 .4em;overflow-wrap:anywhere}
p{max-width:46em;overflow-wrap:anywhere}
svg{display:block;max-width:100%;height:auto}
figure{margin:0}
.narrow{display:none}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5em,1fr));gap:.7em;margin:0 0 1em}
.cards div{border:1px solid #e2e2e2;border-radius:6px;padding:.5em .8em}
.cards dt{font-size:.82em;color:#666;overflow-wrap:anywhere}
.cards dd{margin:0;font-size:1.25em;font-weight:600;font-variant-numeric:tabular-nums}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr));gap:1.4em 1.6em;align-items:end}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9em;font-variant-numeric:tabular-nums}
th,td{padding:.28em 1.3em .28em 0;text-align:left;vertical-align:top;border-bottom:1px solid #e8e8e8}
tbody th{font-weight:400;color:#555;min-width:8.5em}
td.n,th.n{text-align:right}
td.words{overflow-wrap:anywhere;min-width:16em}
summary{cursor:pointer;margin:.6em 0;color:#0b5394}
code{font-size:.95em;overflow-wrap:anywhere}
@media (max-width:640px){.broad{display:none}.narrow{display:block}body{padding:1em .9em 2em}h1{font-size:1.35em}}
@media print{body{max-width:none;padding:0;font-size:10.5pt}.broad{display:block}.narrow{display:none}
.panels{grid-template-columns:1fr 1fr}h2{break-after:avoid}svg,tr,.cards div{break-inside:avoid}.wide{overflow:visible}}
"""


def page(runs: Sequence[RunData], title: str) -> str:
    """The whole page; everything that comes from a run is escaped."""
    sections = [f"<h1>{escape(title)}</h1>", cards(runs)]
    if len(runs) > 1:
        sections += [f"<p>{escape(sentence)}</p>" for sentence in verdict(runs)]
    sections += [
        "<h2>Loss</h2>",
        _loss(runs),
        "<h2>In numbers</h2>",
        headline_table(runs),
        "<h2>Speed, memory, traffic</h2>",
        _panels(
            ("tokens per second", lines_figure(runs, "tokens_per_second", "tokens per second")),
            ("seconds per step", lines_figure(runs, "step_seconds", "seconds per step")),
            ("seconds waiting for data", lines_figure(runs, "data_seconds", "seconds waiting for data per step")),
            ("MFU", lines_figure(runs, "mfu", "MFU, % of the ranks' peak", scale=100)),
            ("memory", lines_figure(runs, "memory_bytes", "memory of rank 0, GB", scale=1e-9)),
            *((f"bytes sent by {run.name}", traffic_figure(run, titled=len(runs) > 1)) for run in runs),
        ),
        *_layers(runs, "Experts", "experts", EXPERTS),
        *_layers(runs, "FP8 casts, the worst product of each layer", "fp8", CASTS),
        *_goodput(runs),
        "<h2>Optimization</h2>",
        _panels(
            ("gradient norm", lines_figure(runs, "grad_norm", "global gradient norm", log=True)),
            ("learning rate", lines_figure(runs, "lr", "learning rate")),
        ),
        "<h2>Events</h2>",
        events_table(runs),
        "<h2>Configuration</h2>",
        config_tables(runs),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def cards(runs: Sequence[RunData]) -> str:
    """The first run's main numbers: with several, the others stand beside it in the table."""
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in highlights(runs[0]).items())
    return (f"<h3>{escape(runs[0].name)}</h3>" if len(runs) > 1 else "") + f'<dl class="cards">{items}</dl>'


def headline_table(runs: Sequence[RunData]) -> str:
    """A column per run, a row per fact that any of them has."""
    columns = [headline(run) for run in runs]
    labels = [k for k in dict.fromkeys(k for c in columns for k in c) if k != "end"] + ["end"]
    return _table(["", *(r.name for r in runs)], [[k, *(c.get(k, "") for c in columns)] for k in labels])


def events_table(runs: Sequence[RunData]) -> str:
    """What happened, in the order in which it was written; many uneventful rows are folded away."""
    rows = [(run, event) for run in runs for event in run.events]
    if not rows:
        return "<p>No events were recorded.</p>"
    head = (["run"] if len(runs) > 1 else []) + ["time (UTC)", "step", "event", "details"]

    def table(chosen: Sequence[tuple[RunData, Row]]) -> str:
        cells = [[run.name] * (len(runs) > 1) + [_when(e), f"{e['step']:,}", e["event"], _details(e)] for run, e in chosen]
        return _table(head, cells, numbers={len(head) - 3}, named=len(runs) > 1)

    if len(rows) <= EVENTS_SHOWN:
        return table(rows)
    telling = [(run, e) for run, e in rows if e["event"] not in UNEVENTFUL]
    folded = f"<details><summary>all {len(rows):,} events</summary>{table(rows)}</details>"
    return (table(telling) if len(telling) <= EVENTS_SHOWN else "") + folded


def config_tables(runs: Sequence[RunData]) -> str:
    """The keys that differ between runs, then all of them behind a fold."""
    keys = list(dict.fromkeys(k for r in runs for k in r.config))
    if not keys:
        return "<p>No config.yaml was found.</p>"
    rows = {k: [plain(r.config[k]) if k in r.config else "" for r in runs] for k in keys}
    head = ["key", *(r.name for r in runs)]
    parts = []
    if len(runs) > 1:
        differ = [k for k in keys if len(set(rows[k])) > 1]
        parts.append("<p>Keys that differ:</p>" + _table(head, [[k, *rows[k]] for k in differ]) if differ else "<p>No key differs.</p>")
        parts.append(
            "<p>A run that was resumed shows its config as of the last resume.</p>" if any(len(r.starts) > 1 for r in runs) else ""
        )
    parts.append(f"<details><summary>all {len(keys)} keys</summary>{_table(head, [[k, *rows[k]] for k in keys])}</details>")
    return "".join(parts)


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


def _layers(runs: Sequence[RunData], head: str, group: str, readings: Mapping[str, str]) -> list[str]:
    """What the modules of a group told, by layer and step, for the runs that have some."""
    parts = []
    for run in runs:
        figures = [(f"{title} of {run.name}, by layer", heat_figure(run, group, key, title)) for key, title in readings.items()]
        if any(figure is not None for _, figure in figures):
            parts += [f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else "", _panels(*figures)]
    return [f"<h2>{head}</h2>", *parts] if parts else []


def _goodput(runs: Sequence[RunData]) -> list[str]:
    """Where the time went, for the runs that tell it."""
    told = [(run, figure) for run in runs if (figure := goodput_figure(run)) is not None]
    parts = ["<h2>Where the time went</h2>"] if told else []
    for run, figure in told:
        parts.append(f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else "")
        parts.append(f'<figure class="wide">{svg(figure, f"time of {run.name} by attempt")}</figure>')
        parts.append(_table(["", "time", "share", ""], goodput_table(run), numbers={1, 2}))
    return parts


def _loss(runs: Sequence[RunData]) -> str:
    description = "Loss over steps of " + ", ".join(r.name for r in runs)
    broad, narrow = svg(loss_figure(runs), description), svg(loss_figure(runs, look=NARROW), description)
    return f'<figure class="broad">{broad}</figure><figure class="narrow">{narrow}</figure>'


def _panels(*figures: tuple[str, Figure | None]) -> str:
    drawn = [f"<figure>{svg(figure, f'{name} over steps')}</figure>" for name, figure in figures if figure is not None]
    return f'<div class="panels">{"".join(drawn)}</div>' if drawn else "<p>Nothing of this was recorded.</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: frozenset[int] | set[int] = frozenset(), named: bool = True) -> str:
    """Cells are escaped here and nowhere else. `named` rows have their first cell as their heading."""

    def cell(index: int, text: str, kind: str) -> str:
        extra = ' class="n"' if index in numbers else ' class="words"' if kind == "td" and len(text) > 60 else ""
        return f"<{kind}{extra}>{escape(text)}</{kind}>"

    top = "".join(cell(i, h, "th") for i, h in enumerate(head))
    body = "".join("<tr>" + "".join(cell(i, c, "th" if i == 0 and named else "td") for i, c in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _when(event: Row) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(as_number(event.get("time"))))
    except (ValueError, OverflowError, OSError):
        return ""  # no time, or none that a calendar has


def _details(event: Row) -> str:
    """Free keys as "key value"; changes as "key: old → new"."""
    parts = []
    for key, value in event.items():
        if key in ("time", "step", "event", "began", "last_seen") or value in (None, "", [], {}):
            continue
        if key == "changes" and isinstance(value, dict):
            parts += [f"{k}: {' → '.join(map(plain, v)) if isinstance(v, list) else plain(v)}" for k, v in value.items()]
        else:
            parts.append(f"{key} {plain(value)}")
    return ", ".join(parts)
