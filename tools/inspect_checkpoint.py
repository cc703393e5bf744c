#!/usr/bin/env python3
"""What is inside a checkpoint, its format version, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megascale.checkpoint.index import TensorEntry, read_index, read_json
from megascale.checkpoint.loader import find, verify
from megascale.cli import new_app, run_tool
from megascale.errors import UsageError

app = new_app(__doc__ or "")


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="a folder step-…, or a run directory")],
    check: Annotated[bool, typer.Option("--verify", help="read every file and compare its checksum")] = False,
    tensors: Annotated[bool, typer.Option(help="list every tensor")] = False,
) -> None:
    """Prints a summary of the checkpoint at FOLDER; exit code 2 when it is not whole."""
    path = find(folder)
    index, trainer = read_index(path), read_json(path / "trainer.json")
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    total = sum(entry.bytes for entry in index.files.values())
    console.print(f"{path}: format version {index.version}, {len(index.files)} shard files, {total / 1e6:,.1f} MB")
    for key in ("step", "samples", "tokens", "layout", "torch"):
        if key in trainer:
            console.print(f"  {key}: {trainer[key]}")
    table = Table("tensors", "count", "elements", "MB", "dtypes")
    for group, entries in sorted(by_group(index.tensors).items()):
        dtypes = ", ".join(sorted({e.dtype for e in entries}))
        size = sum(e.nbytes for e in entries) / 1e6
        table.add_row(group, str(len(entries)), f"{sum(e.numel for e in entries):,}", f"{size:,.1f}", dtypes)
    console.print(table)
    if tensors:
        for name, entry in sorted(index.tensors.items()):
            console.print(f"  {name} {list(entry.shape)} {entry.dtype} in {len(entry.chunks)} chunks")
    if not check:
        missing = [name for name in index.files if not (path / name).is_file()]
        if missing:
            raise UsageError(f"{path} is not whole: {missing[0]} is missing")
        console.print("all files are there; --verify compares their contents")
        return
    problems = verify(index)
    if problems:
        raise UsageError(f"{path} is not whole: " + "; ".join(problems))
    console.print("whole: every file has the size and checksum that the index says")


def by_group(tensors: dict[str, TensorEntry]) -> dict[str, list[TensorEntry]]:
    """`model`, `optim.exp_avg`, … → their tensors."""
    groups: dict[str, list[TensorEntry]] = {}
    for name, entry in tensors.items():
        first, second = name.split(".")[:2] if "." in name else (name, "")
        groups.setdefault(f"{first}.{second}" if first == "optim" else first, []).append(entry)
    return groups


if __name__ == "__main__":
    run_tool(app)
