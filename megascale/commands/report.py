"""One HTML page about one or several runs: curves, throughput, traffic, memory, events; the last of several is the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megascale.cli import examples, new_app
from megascale.errors import UsageError

app = new_app(__doc__ or "")


@app.command(epilog=examples("megascale report runs/llama-125m", "megascale report runs/new runs/old --out compare.html --png loss.png"))
def main(
    runs: Annotated[list[Path], typer.Argument(help="run directories; with several, differences are against the last")],
    out: Annotated[Path, typer.Option(help="the page")] = Path("report.html"),
    picture: Annotated[Path | None, typer.Option("--png", help="also write the loss figure as a picture")] = None,
    title: Annotated[str | None, typer.Option(help="heading of the page and the picture")] = None,
) -> None:
    """Reads RUNS and writes the page."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out writes an HTML page, but the name is {out}: name it {out.name or 'report'}.html")
    if picture is not None and picture.suffix.lower() != ".png":
        raise UsageError(f"--png writes a PNG file, but the name is {picture}: name it {picture.with_suffix('.png')}")
    from megascale.files import atomic_file, write_atomic
    from megascale.report.canvas import png
    from megascale.report.loss import loss_figure
    from megascale.report.page import page
    from megascale.report.read import read_runs

    data = read_runs(runs)
    html = page(data, title or " · ".join(run.name for run in data))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # JSON can hold half surrogate pairs, which no file can; they become question marks.
        write_atomic(out, html.encode("utf-8", "replace").decode("utf-8"))
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(picture) as temporary:
                png(loss_figure(data, title), temporary)
    except OSError as error:
        raise UsageError(f"the report cannot be written: {error}; choose another place with --out or --png") from None
    print(f"wrote {out}" + (f" and {picture}" if picture else ""))
