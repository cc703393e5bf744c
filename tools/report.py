#!/usr/bin/env python3
"""One HTML page about one or several runs: curves, throughput, traffic, memory, events; the last run named is the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megascale.cli import new_app, run_tool
from megascale.errors import UsageError
from megascale.report.figures import loss_figure, png
from megascale.report.page import page
from megascale.report.read import read_run

app = new_app(__doc__ or "")


@app.command()
def main(
    runs: Annotated[list[Path], typer.Argument(help="run directories; with several, differences are against the last")],
    out: Annotated[Path, typer.Option(help="the page")] = Path("report.html"),
    picture: Annotated[Path | None, typer.Option("--png", help="also write the loss figure as a picture")] = None,
    title: Annotated[str | None, typer.Option(help="heading")] = None,
) -> None:
    """Reads RUNS and writes the page."""
    data = [read_run(folder) for folder in runs]
    heading = title or " · ".join(r.name for r in data)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(data, heading), encoding="utf-8")
        if picture is not None:
            png(loss_figure(data, title), picture)
    except OSError as error:
        raise UsageError(f"the report cannot be written: {error}") from None
    print(f"wrote {out}" + (f" and {picture}" if picture else ""))


if __name__ == "__main__":
    run_tool(app)
