#!/usr/bin/env python3
"""Text, JSON lines or Parquet files and folders → token files that pretrain.py reads; with --pairs sources and targets side by side."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megascale.cli import check_path, new_app, run_tool
from megascale.data.aligned import pair_files
from megascale.data.prepare import Facts, prepare, prepare_pairs, sample_texts
from megascale.data.publish import claim
from megascale.data.readers import LONGEST
from megascale.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megascale.data.walk import OUTPUTS, choose_files
from megascale.data.workers import ended_by_signals, usable_cores
from megascale.errors import UsageError

SIDES = (".source", ".target")
VOCABULARY = 8192
app = new_app(__doc__ or "")


@app.command()
def main(
    inputs: Annotated[list[Path], typer.Argument(help="files of text, JSON lines or Parquet, each also packed (.gz, .zst …), and folders")],
    out: Annotated[str, typer.Option(help="prefix of the files to write: PREFIX.bin, .idx, .json, .model")],
    tokenizer: Annotated[Path | None, typer.Option(help="SentencePiece .model or Hugging Face tokenizer.json; trained if absent")] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=3, max=1 << 24, help=f"pieces of the tokenizer to train; {VOCABULARY} at most if absent")
    ] = None,
    text_key: Annotated[str, typer.Option(help="JSON key or Parquet column of the text, or a path such as meta.text")] = "text",
    pattern: Annotated[str, typer.Option(help="files to take from folders")] = "*",
    exclude: Annotated[list[str], typer.Option(help="name of folders to leave out; may be repeated")] = ["site-packages"],  # noqa: B006
    workers: Annotated[int | None, typer.Option(min=1, max=1024, help="processes; the cores that may be used if absent")] = None,
    append_eos: Annotated[bool, typer.Option(help="end each document with the end token")] = True,
    eos: Annotated[str | None, typer.Option(help="the end token's name; as the tokenizer and the files beside it say if absent")] = None,
    bos: Annotated[bool, typer.Option("--bos", help="begin each document, and later each prompt, with the beginning token")] = False,
    longest_line: Annotated[int, typer.Option(min=1, max=1 << 40, help="bytes of a JSON line or a Parquet value")] = LONGEST,
    overwrite: Annotated[bool, typer.Option(help="replace existing output")] = False,
    pairs: Annotated[bool, typer.Option(help="INPUTS are two text files with a pair in each line, or JSON lines with both sides")] = False,
    source_key: Annotated[str, typer.Option(help="with --pairs, JSON key of the sources")] = "source",
    target_key: Annotated[str, typer.Option(help="with --pairs, JSON key of the targets")] = "target",
    separate: Annotated[bool, typer.Option(help="with --pairs, a vocabulary for each side")] = False,
    source_tokenizer: Annotated[Path | None, typer.Option(help="with --pairs, of the sources alone")] = None,
) -> None:
    """Tokenizes INPUTS. One document is a text file, a JSON line, a Parquet row, or with --pairs one side of a pair."""
    if tokenizer is not None and vocab_size is not None:
        raise UsageError(f"--tokenizer {tokenizer} and --vocab-size {vocab_size} exclude each other: a given tokenizer has its own size")
    if not pairs and (separate or source_tokenizer is not None):
        raise UsageError("--separate and --source-tokenizer are for sources and targets: add --pairs, or leave them out")
    if pairs and bos:
        raise UsageError("--bos is for documents, and targets of --pairs begin with data.start_token: leave one of them out")
    prefixes = [out + side for side in (SIDES if pairs else ("",))]
    outputs = [Path(prefix + ending) for prefix in prefixes for ending in OUTPUTS]
    check_out(out, outputs)
    given = [t for t in (tokenizer, source_tokenizer) if t is not None and os.path.exists(t)]
    check_free(outputs, given, overwrite)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    keys = (source_key, target_key) if pairs else (text_key,)
    chosen = choose_files(inputs, pattern, exclude, keys, once=not pairs, outputs=outputs)
    for sentence in chosen.sentences():
        console.print(sentence, markup=False)
    files = chosen.files
    with ended_by_signals(), ExitStack() as held, tempfile.TemporaryDirectory() as scratch:
        claims = [held.enter_context(claim(prefix, OUTPUTS)) for prefix in prefixes]
        check_free(outputs, given, overwrite)  # another process may have been faster
        sides = pair_files(files, (source_key, target_key)) if pairs else (files, files)

        def trained(name: str, parts: list[tuple[list[Path], str]]) -> Path:
            console.print(f"training a tokenizer of {vocab_size or VOCABULARY} pieces{name and f' for the {name}s'} …")
            path = Path(scratch) / f"trained{name}.model"
            texts = chain.from_iterable(sample_texts(f, key, longest=longest_line) for f, key in parts)
            size = train_sentencepiece(texts, vocab_size or VOCABULARY, path, exact=vocab_size is not None)
            if size < (vocab_size or VOCABULARY):
                console.print(f"the text has no more than {size} pieces")
            return path

        own = pairs and (separate or source_tokenizer is not None)
        if own and source_tokenizer is None:
            source_tokenizer = trained("source", [(sides[0], source_key)])
        if tokenizer is None:
            both = [(sides[0], source_key), (sides[1], target_key)]
            tokenizer = trained("target" if own else "", both[1:] if own else both if pairs else [(files, text_key)])
        of_targets = load_tokenizer(tokenizer, eos=eos)
        of_sources = load_tokenizer(source_tokenizer, eos=eos) if source_tokenizer is not None else of_targets

        def make(progress: Callable[[int], None]) -> dict[str, Facts]:
            cores = workers or usable_cores()
            if pairs:
                return dict(
                    zip(SIDES, prepare_pairs(files, out, (of_sources, of_targets), (source_key, target_key), cores, progress, longest_line))
                )
            return {"": prepare(files, out, of_targets, text_key, cores, append_eos, progress, bos, longest_line)}

        start = time.perf_counter()
        made = with_progress(make, files, [c.alive for c in claims], console)
        seconds = time.perf_counter() - start
    speed = sum(f.source_bytes for f in made.values()) / 1e6 / seconds
    for side, facts in made.items():
        for warning in warnings(facts, of_sources if side == SIDES[0] else of_targets):
            console.print(f"warning: {warning}", markup=False)
        print(
            f"{out}{side}: {facts.documents:,} documents, {facts.tokens:,} tokens, {facts.source_bytes / facts.tokens:.2f} bytes a token, "
            f"{speed:.1f} MB/s; unigram entropy {facts.unigram_entropy:.4f} nats"
        )


def check_out(out: str, outputs: list[Path]) -> None:
    """Raises UsageError for a prefix that cannot be one."""
    check_path(out)
    if not out.isprintable() or max(len(os.fsencode(part)) for p in outputs for part in p.parts) > 240 or len(os.fsencode(out)) > 4000:
        raise UsageError(f"--out {out[:80]!r} is no prefix of files: it has characters that do not print, or too many of them")
    if Path(out).is_dir() or out.endswith(("/", os.sep)) or not Path(out).name:
        raise UsageError(f"--out {out} is a folder, and a prefix is needed: for example {Path(out) / 'text'}")


def check_free(outputs: list[Path], given: list[Path], overwrite: bool) -> None:
    """Raises UsageError where output exists that is neither a tokenizer that was `given` nor to be replaced."""
    existing = [p for p in outputs if p.exists() and not any(p.samefile(t) for t in given)]
    folders = [p for p in existing if p.is_dir()]
    if folders:
        raise UsageError(f"{folders[0]} is a folder where a file is to be written: choose another --out")
    if existing and not overwrite:
        raise UsageError(f"{existing[0]} exists: choose another --out, or add --overwrite")


def with_progress(
    make: Callable[[Callable[[int], None]], dict[str, Facts]], files: list[Path], signs: list[Callable[[], None]], console: Console
) -> dict[str, Facts]:
    """`make`, its progress shown on a terminal; after each part of it the `signs` of life are given."""
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # Refreshed by hand: a refreshing thread could hold a lock at the moment when the workers are forked.
    with Progress(*columns, console=console, disable=not console.is_terminal, auto_refresh=False) as bar:
        task = bar.add_task("", total=sum(f.stat().st_size for f in files if f.exists()))

        def show(done: int) -> None:
            bar.update(task, advance=done, refresh=True)
            for sign in signs:
                sign()

        return make(show)


def warnings(facts: Facts, tokenizer: Tokenizer) -> list[str]:
    """What of the text was not taken as it stands."""
    said: list[str] = []
    if facts.not_utf8_files:
        said.append(f"{facts.not_utf8_files} files are not valid UTF-8; what is not was replaced by U+FFFD")
    if facts.null_documents:
        said.append(f"{facts.null_documents} documents are null and were left out")
    if facts.empty_files:
        said.append(f"{facts.empty_files} of the inputs gave no document: they are empty, or nothing but empty documents")
    if facts.byte_order_marks:
        said.append(f"{facts.byte_order_marks} byte-order marks at the beginning of documents were left out")
    if facts.special_tokens:
        said.append(
            f"{facts.special_tokens} tokens of the text are special ones, such as the end {tokenizer.decode([tokenizer.eos_id])!r}: their "
            "names stand in it, and this tokenizer cannot read them as text; take them out of the text if they mean nothing"
        )
    return said


if __name__ == "__main__":
    run_tool(app)
