#!/usr/bin/env python3
"""Text, JSONL or Parquet files and folders → token files that pretrain.py reads."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megascale.cli import new_app, run_tool
from megascale.data.prepare import make_tokenizer, prepare
from megascale.data.readers import find_files
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import UsageError

app = new_app(__doc__ or "")


@app.command()
def main(
    inputs: Annotated[list[Path], typer.Argument(help="files (.txt, .jsonl, .parquet, each also .gz or .zst) and folders")],
    out: Annotated[str, typer.Option(help="prefix of the files to write: PREFIX.bin, .idx, .json, .model")],
    tokenizer: Annotated[Path | None, typer.Option(help="SentencePiece .model or Hugging Face tokenizer.json; trained if absent")] = None,
    vocab_size: Annotated[int, typer.Option(help="pieces of the tokenizer to train")] = 8192,
    text_key: Annotated[str, typer.Option(help="JSON key or Parquet column of the text")] = "text",
    pattern: Annotated[str, typer.Option(help="files to take from folders")] = "*",
    workers: Annotated[int, typer.Option(min=1, help="processes")] = os.cpu_count() or 1,
    append_eos: Annotated[bool, typer.Option(help="end each document with the end token")] = True,
    overwrite: Annotated[bool, typer.Option(help="replace existing output")] = False,
) -> None:
    """Tokenizes INPUTS. One document is a text file, a JSONL line or a Parquet row."""
    console = Console(stderr=True, highlight=False)
    files = find_files(inputs, pattern)
    existing = [p for p in (Path(out + end) for end in (".bin", ".idx")) if p.exists()]
    if existing and not overwrite:
        raise UsageError(f"{existing[0]} exists: choose another --out, or add --overwrite")
    if tokenizer is None:
        console.print(f"training a tokenizer of {vocab_size} pieces …")
        chosen = make_tokenizer(files, text_key, vocab_size, out)
    else:
        chosen = load_tokenizer(tokenizer)
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    packed = any(f.suffix in (".gz", ".zst", ".parquet") for f in files)
    start = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None if packed else sum(f.stat().st_size for f in files))
        facts = prepare(files, out, chosen, text_key, workers, append_eos, lambda done: bar.advance(task, done))
    seconds = time.perf_counter() - start
    print(
        f"{out}: {facts.documents:,} documents, {facts.tokens:,} tokens, {facts.source_bytes / facts.tokens:.2f} characters a token, "
        f"{facts.source_bytes / 1e6 / seconds:.1f} MB/s; unigram entropy {facts.unigram_entropy:.4f} nats"
    )


if __name__ == "__main__":
    run_tool(app)
