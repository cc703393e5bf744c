#!/usr/bin/env python3
"""Text, JSONL or Parquet files and folders → token files that pretrain.py reads; with --pairs sources and targets side by side."""

from __future__ import annotations

import os
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megascale.cli import new_app, run_tool
from megascale.data.prepare import prepare, prepare_pairs, sample_texts
from megascale.data.readers import find_files, is_text
from megascale.data.tokenizer import load_tokenizer, train_sentencepiece
from megascale.errors import UsageError

ENDINGS = (".bin", ".idx", ".json", ".model", ".tokenizer.json")
SIDES = (".source", ".target")
VOCABULARY = 8192
app = new_app(__doc__ or "")


@app.command()
def main(
    inputs: Annotated[list[Path], typer.Argument(help="files (.txt, .jsonl, .parquet, each also .gz or .zst) and folders")],
    out: Annotated[str, typer.Option(help="prefix of the files to write: PREFIX.bin, .idx, .json, .model")],
    tokenizer: Annotated[Path | None, typer.Option(help="SentencePiece .model or Hugging Face tokenizer.json; trained if absent")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=3, help=f"pieces of the tokenizer to train, {VOCABULARY} if absent")] = None,
    text_key: Annotated[str, typer.Option(help="JSON key or Parquet column of the text")] = "text",
    pattern: Annotated[str, typer.Option(help="files to take from folders")] = "*",
    exclude: Annotated[list[str], typer.Option(help="name of folders to leave out; may be repeated")] = ["site-packages"],  # noqa: B006
    workers: Annotated[int, typer.Option(min=1, help="processes")] = os.cpu_count() or 1,
    append_eos: Annotated[bool, typer.Option(help="end each document with the end token")] = True,
    overwrite: Annotated[bool, typer.Option(help="replace existing output")] = False,
    pairs: Annotated[bool, typer.Option(help="INPUTS are two text files with a pair in each line, or JSONL with both sides")] = False,
    source_key: Annotated[str, typer.Option(help="with --pairs, JSON key of the sources")] = "source",
    target_key: Annotated[str, typer.Option(help="with --pairs, JSON key of the targets")] = "target",
    separate: Annotated[bool, typer.Option(help="with --pairs, a vocabulary for each side")] = False,
    source_tokenizer: Annotated[Path | None, typer.Option(help="with --pairs, of the sources alone")] = None,
) -> None:
    """Tokenizes INPUTS. One document is a text file, a JSONL line, a Parquet row, or with --pairs one side of a pair."""
    outputs = [Path(out + side + ending) for side in (SIDES if pairs else ("",)) for ending in ENDINGS]
    if tokenizer is not None and vocab_size is not None:
        raise UsageError(f"--tokenizer {tokenizer} and --vocab-size {vocab_size} exclude each other: a given tokenizer has its own size")
    if Path(out).is_dir() or out.endswith(("/", os.sep)):
        raise UsageError(f"--out {out} is a folder, and a prefix is needed: for example {Path(out) / 'text'}")
    if not pairs and (separate or source_tokenizer is not None):
        raise UsageError("--separate and --source-tokenizer are for sources and targets: add --pairs, or leave them out")
    given = [t for t in (tokenizer, source_tokenizer) if t is not None and t.exists()]
    existing = [p for p in outputs if p.exists() and not any(p.samefile(t) for t in given)]
    if existing and not overwrite:
        raise UsageError(f"{existing[0]} exists: choose another --out, or add --overwrite")
    files = [f for f in find_files(inputs, pattern, exclude) if f not in outputs]
    console = Console(stderr=True, highlight=False)
    other = [f for f in files if not is_text(f)]
    named = [f for f in other if f in inputs]
    if named:
        raise UsageError(f"{named[0]} is not text, it has zero bytes: leave it out, or give the text that is in it")
    if other:
        console.print(f"left out {len(other)} files in folders that are not text, such as {other[0]}")
        files = [f for f in files if f not in set(other)]
    with tempfile.TemporaryDirectory() as scratch:
        keys, sides = (source_key, target_key), pair_files(files)

        def trained(name: str, parts: list[tuple[list[Path], str]]) -> Path:
            console.print(f"training a tokenizer of {vocab_size or VOCABULARY} pieces{name and f' for the {name}s'} …")
            path = Path(scratch) / f"trained{name}.model"
            train_sentencepiece(chain.from_iterable(sample_texts(f, key) for f, key in parts), vocab_size or VOCABULARY, path)
            return path

        own = pairs and (separate or source_tokenizer is not None)
        if own and source_tokenizer is None:
            source_tokenizer = trained("source", [(sides[0], keys[0])])
        if tokenizer is None:
            both = list(zip(sides, keys))
            tokenizer = trained("target" if own else "", both[1:] if own else both if pairs else [(files, text_key)])
        chosen = load_tokenizer(tokenizer)
        chosen_for_sources = load_tokenizer(source_tokenizer) if source_tokenizer is not None else chosen
        columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        start = time.perf_counter()
        # Refreshed by hand: a refreshing thread could hold a lock at the moment when the workers are forked.
        with Progress(*columns, console=console, disable=not console.is_terminal, auto_refresh=False) as bar:
            task = bar.add_task("", total=sum(f.stat().st_size for f in files))

            def show(done: int) -> None:
                bar.update(task, advance=done, refresh=True)

            if pairs:
                made = dict(zip(SIDES, prepare_pairs(files, out, (chosen_for_sources, chosen), keys, workers, show)))
            else:
                made = {"": prepare(files, out, chosen, text_key, workers, append_eos, show)}
    seconds = time.perf_counter() - start
    speed = sum(f.source_bytes for f in made.values()) / 1e6 / seconds
    for side, facts in made.items():
        if facts.not_utf8_files:
            console.print(f"warning: {facts.not_utf8_files} files are not valid UTF-8; what is not was replaced by U+FFFD")
        print(
            f"{out}{side}: {facts.documents:,} documents, {facts.tokens:,} tokens, {facts.source_bytes / facts.tokens:.2f} bytes a token, "
            f"{speed:.1f} MB/s; unigram entropy {facts.unigram_entropy:.4f} nats"
        )


def pair_files(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Which files have sources and which targets: two text files one each, JSONL both."""
    return (files[:1], files[1:]) if len(files) == 2 and not {".jsonl", ".ndjson"} & set(files[0].suffixes) else (files, files)


if __name__ == "__main__":
    run_tool(app)
