"""Merges checkpoints of one model into their weighted mean, whatever layouts wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megascale.cli import examples, new_app
from megascale.commands.growing import Report, Slab, Trust, Workers, check_report, print_next, progress_bar, write_report
from megascale.errors import UsageError

app = new_app(__doc__ or "")


@app.command(
    epilog=examples(
        "megascale merge runs/trunk --last 8 --every 500 --out merged",
        "megascale merge runs/a runs/b runs/c --weights 1,1,2 --out merged",
    )
)
def main(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help="folders step-… or run directories; with --last one run")],
    out: Annotated[Path | None, typer.Option("--out", metavar="TARGET", help="a folder that does not exist yet")] = None,
    weights: Annotated[str | None, typer.Option(help="relative weights of the sources, such as 1,1,2; default: equal")] = None,
    last: Annotated[int | None, typer.Option(min=2, help="the last so many checkpoints of the run")] = None,
    every: Annotated[int | None, typer.Option(min=1, help="with --last: only those so many steps apart")] = None,
    report: Report = None,
    workers: Workers = 1,
    max_slab_mb: Slab = 256,
    trust_source: Trust = False,
) -> None:
    """Writes the mean of the weights to TARGET. The optimizer's state is left out."""
    from megascale.expand.merge import last_of, merge
    from megascale.expand.write import Effort

    if out is None:
        raise UsageError("merge needs --out TARGET: the folder to write to, which does not exist yet")
    if every is not None and last is None:
        raise UsageError("--every chooses among the last checkpoints of a run: add --last N, or leave it out")
    if last is not None and len(sources) > 1:
        raise UsageError(f"--last takes checkpoints of one run, but {len(sources)} sources are named: name one run, or leave --last out")
    check_report(report)
    chosen = list(sources) if last is None else last_of(sources[0], last, every)
    effort = Effort(workers, max_slab_mb << 20, 1, not trust_source)
    with progress_bar() as progress:
        found = merge(chosen, out, numbers(weights), effort, progress)
    write_report(report, found)
    for source, weight in zip(found["sources"], found["weights"]):
        print(f"  {weight:.4f} × {source}")
    print(f"{found['target']}: the mean of {len(chosen)} checkpoints, {found['seconds']} s")
    print_next(out)


def numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights is {text!r}: write numbers such as 1,1,2") from None
