"""Shows what is inside a checkpoint, its format version, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megascale.cli import examples, new_app
from megascale.errors import UsageError
from megascale.sizes import byte_words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from megascale.checkpoint.index import Index, TensorEntry

app = new_app(__doc__ or "")


@app.command(epilog=examples("megascale inspect runs/llama-125m", "megascale inspect runs/llama-125m/checkpoints/step-00000100 --verify"))
def main(
    folder: Annotated[Path, typer.Argument(help="a folder step-…, or a run directory")],
    check: Annotated[bool, typer.Option("--verify", help="read every file and compare its checksum")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="list every tensor")] = False,
) -> None:
    """Prints a summary of the checkpoint at FOLDER; exit code 2 if it is not whole."""
    from rich.console import Console

    from megascale.checkpoint.index import read_index, size_problems
    from megascale.checkpoint.loader import find, verify
    from megascale.checkpoint.trainer import read_trainer

    path = find(folder)
    index, trainer = read_index(path), read_trainer(path)
    problems = verify(index) if check else size_problems(index)
    if problems:
        raise UsageError(f"{path} is not whole: " + "; ".join(problems))
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=160)  # a pipe has no width, and truncated paths are useless
    total = sum(entry.bytes for entry in index.files.values())
    say(console, f"{path}: format version {index.version}, {len(index.files)} files, {byte_words(total)}")
    # The config repeats the identity and adds what may change at a resume; trainer.json has it in full.
    for key, value in plain({k: v for k, v in trainer.items() if k != "config"}):
        say(console, f"  {key}: {value}")
    console.print(tensor_table(index))
    console.print(file_table(index))
    if tensors:
        for name, entry in sorted(index.tensors.items()):
            say(console, f"  {name} {list(entry.shape)} {entry.dtype} in {len(entry.chunks)} chunks")
    say(
        console,
        "whole: every file has the size and checksum that the index says"
        if check
        else "every file has its size; --verify also compares checksums",
    )


def say(console: Console, line: str) -> None:
    """Prints a line verbatim: names and paths may look like rich's mark-up."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def plain(trainer: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The trainer's JSON, the run's identity included, as a flat list of keys and values."""
    rows = []
    for key, value in trainer.items():
        rows += plain(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return rows


def tensor_table(index: Index) -> Table:
    from rich.table import Table

    table = Table("tensors", "count", "elements", "size", "dtypes")
    for group, entries in sorted(by_group(index.tensors).items()):
        dtypes = ", ".join(sorted({e.dtype for e in entries}))
        size = byte_words(sum(e.nbytes for e in entries))
        table.add_row(group, str(len(entries)), f"{sum(e.numel for e in entries):,}", size, dtypes)
    return table


def file_table(index: Index) -> Table:
    from rich.table import Table

    table = Table("file", "bytes", "crc32")
    for name, entry in sorted(index.files.items()):
        table.add_row(name, f"{entry.bytes:,}", f"{entry.crc32:08x}")
    return table


def by_group(tensors: dict[str, TensorEntry]) -> dict[str, list[TensorEntry]]:
    """`model`, `optim.exp_avg`, … → their tensors."""
    groups: dict[str, list[TensorEntry]] = {}
    for name, entry in tensors.items():
        first, _, rest = name.partition(".")
        groups.setdefault(f"{first}.{rest.partition('.')[0]}" if first == "optim" else first, []).append(entry)
    return groups
