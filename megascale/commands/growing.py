"""Shared by `grow` and `shrink`: source and target, resources, and the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megascale.errors import UsageError

if TYPE_CHECKING:
    from megascale.checkpoint.streaming import Progress

From = Annotated[Path, typer.Argument(metavar="SOURCE", help="a folder step-…, or a run's directory")]
To = Annotated[Path, typer.Argument(metavar="TARGET", help="a folder that does not exist yet")]
Size = Annotated[int | None, typer.Option(min=1, rich_help_panel="sizes")]
Report = Annotated[Path | None, typer.Option(help="write the report as JSON to this file")]
TokenFiles = Annotated[str | None, typer.Option(help="prefix of token files for measurements; default: the source's own")]
Workers = Annotated[int, typer.Option(min=1, help="writing processes; the result does not depend on their number")]
Slab = Annotated[int, typer.Option("--max-slab-mb", min=1, help="size of a slab; a worker needs about three times as much")]
Trust = Annotated[bool, typer.Option("--trust-source", help="do not verify its files' checksums first")]


@contextmanager
def progress_bar() -> Iterator[Progress]:
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = ("[progress.description]{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, transient=True) as bar:
        task = bar.add_task("writing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def check_report(path: Path | None) -> None:
    """Raises UsageError for a path that could not be written after all the work."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise UsageError(f"--report {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"--report {path} is a folder: name a file")
    new = not path.exists()
    try:
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise UsageError(f"--report {path} cannot be written: {error.strerror}") from None


def write_report(path: Path | None, found: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{found['target']} is whole, but --report {path} cannot be written: {error.strerror}") from None


def print_sizes(found: dict[str, Any]) -> None:
    print(f"{found['target']}: {found['parameters']['source']:,} → {found['parameters']['target']:,} parameters, {found['seconds']} s")


def print_next(target: Path) -> None:
    print(f"start from it: megascale train {target / 'config.yaml'} checkpoint.init_from={target}")
