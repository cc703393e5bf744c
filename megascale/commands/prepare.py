"""Text, JSON lines or Parquet files and folders → token files that training reads; with --pairs aligned sources and targets."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megascale.cli import check_path, examples, new_app
from megascale.errors import UsageError
from megascale.sizes import byte_words

if TYPE_CHECKING:
    from rich.console import Console

    from megascale.data.prepare import Facts
    from megascale.data.tokenizer import Tokenizer

SIDES = (".source", ".target")
VOCABULARY = 8192
app = new_app(__doc__ or "")


@dataclass(frozen=True)
class Request:
    """The options of the command, the keys of the text or of both sides, and the given tokenizers."""

    out: str
    keys: tuple[str, ...]
    pairs: bool
    separate: bool
    vocab_size: int | None
    workers: int
    append_eos: bool
    eos: str | None
    bos: bool
    longest: int


@app.command(
    epilog=examples(
        "megascale prepare my_texts/ more.jsonl.zst --out data/train --vocab-size 32000",
        "megascale prepare shard.parquet --out data/train --tokenizer tokenizer.json --text-key content",
        "megascale prepare train.src train.tgt --pairs --out data/pairs --vocab-size 8000",
    )
)
def main(
    inputs: Annotated[list[Path], typer.Argument(help="text, JSON lines or Parquet files, also compressed (.gz, .zst …), and folders")],
    out: Annotated[str, typer.Option(help="prefix of the files to write: PREFIX.bin, .idx, .json, .model")],
    tokenizer: Annotated[Path | None, typer.Option(help="SentencePiece .model or Hugging Face tokenizer.json; trained if absent")] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=3, max=1 << 24, help=f"pieces of the tokenizer to train; {VOCABULARY} at most if absent")
    ] = None,
    text_key: Annotated[str, typer.Option(help="JSON key or Parquet column of the text, or a path such as meta.text")] = "text",
    pattern: Annotated[str, typer.Option(help="files to take from folders")] = "*",
    exclude: Annotated[list[str], typer.Option(help="name of folders to skip; may be repeated")] = ["site-packages"],  # noqa: B006
    workers: Annotated[int | None, typer.Option(min=1, max=1024, help="processes; default: the usable cores")] = None,
    append_eos: Annotated[bool, typer.Option(help="end each document with the end token")] = True,
    eos: Annotated[str | None, typer.Option(help="the end token's name; default: from the tokenizer and the files next to it")] = None,
    bos: Annotated[bool, typer.Option("--bos", help="begin each document, and later each prompt, with the beginning token")] = False,
    longest_line: Annotated[
        int | None, typer.Option(min=1, max=1 << 40, help="most bytes of a JSON line or a Parquet value; default: 64 MiB")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace existing output")] = False,
    pairs: Annotated[bool, typer.Option(help="INPUTS are two text files with a pair in each line, or JSON lines with both sides")] = False,
    source_key: Annotated[str, typer.Option(help="with --pairs, JSON key of the sources")] = "source",
    target_key: Annotated[str, typer.Option(help="with --pairs, JSON key of the targets")] = "target",
    separate: Annotated[bool, typer.Option(help="with --pairs, a separate vocabulary for each side")] = False,
    source_tokenizer: Annotated[Path | None, typer.Option(help="with --pairs, a tokenizer for the sources only")] = None,
) -> None:
    """Tokenizes INPUTS. One document is a text file, a JSON line, a Parquet row, or with --pairs one side of a pair."""
    if tokenizer is not None and vocab_size is not None:
        raise UsageError(f"--tokenizer {tokenizer} and --vocab-size {vocab_size} exclude each other: a given tokenizer has its own size")
    if not pairs and (separate or source_tokenizer is not None):
        raise UsageError("--separate and --source-tokenizer are for sources and targets: add --pairs, or leave them out")
    if pairs and bos:
        raise UsageError("--bos is for documents, but targets of --pairs begin with data.start_token: leave one of them out")
    from rich.console import Console

    from megascale.data.publish import claim
    from megascale.data.readers import LONGEST
    from megascale.data.walk import OUTPUTS, choose_files
    from megascale.data.workers import ended_by_signals, usable_cores

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
    cores = workers or usable_cores()
    request = Request(
        out, keys, pairs, separate, vocab_size, cores, append_eos, eos, bos, LONGEST if longest_line is None else longest_line
    )
    with ended_by_signals(), ExitStack() as held, tempfile.TemporaryDirectory() as scratch:
        claims = [held.enter_context(claim(prefix, OUTPUTS)) for prefix in prefixes]
        check_free(outputs, given, overwrite)  # another process may have been faster
        sources, targets = tokenizers(request, chosen.files, tokenizer, source_tokenizer, Path(scratch), console)
        start = time.perf_counter()
        made = with_progress(
            lambda progress: make(request, chosen.files, sources, targets, progress), chosen.files, [c.alive for c in claims], console
        )
        seconds = time.perf_counter() - start
    tell(made, out, seconds, (sources, targets), console)


def tell(made: dict[str, Facts], out: str, seconds: float, sides: tuple[Tokenizer, Tokenizer], console: Console) -> None:
    """Prints what was written, and warnings about changes to the text."""
    speed = sum(f.source_bytes for f in made.values()) / seconds
    for side, facts in made.items():
        for warning in warnings(facts, sides[0] if side == SIDES[0] else sides[1]):
            console.print(f"warning: {warning}", markup=False)
        print(
            f"{out}{side}: {facts.documents:,} documents, {facts.tokens:,} tokens, {facts.source_bytes / facts.tokens:.2f} bytes per "
            f"token, {byte_words(speed)}/s; unigram entropy {facts.unigram_entropy:.4f} nats"
        )


def tokenizers(
    request: Request, files: list[Path], tokenizer: Path | None, source_tokenizer: Path | None, scratch: Path, console: Console
) -> tuple[Tokenizer, Tokenizer]:
    """Tokenizers of sources and of targets, the same without pairs; trained on the files into `scratch` if not given."""
    from megascale.data.aligned import pair_files
    from megascale.data.prepare import sample_texts
    from megascale.data.tokenizer import load_tokenizer, train_sentencepiece

    sides = pair_files(files, (request.keys[0], request.keys[-1])) if request.pairs else (files, files)

    def trained(name: str, parts: list[tuple[list[Path], str]]) -> Path:
        pieces = request.vocab_size or VOCABULARY
        console.print(f"training a tokenizer of {pieces} pieces{name and f' for the {name}s'} …")
        path = scratch / f"trained{name}.model"
        texts = chain.from_iterable(sample_texts(f, key, longest=request.longest) for f, key in parts)
        size = train_sentencepiece(texts, pieces, path, exact=request.vocab_size is not None)
        if size < pieces:
            console.print(f"the text has no more than {size} pieces")
        return path

    own = request.pairs and (request.separate or source_tokenizer is not None)
    both = list(zip(sides, (request.keys[0], request.keys[-1])))
    if own and source_tokenizer is None:
        source_tokenizer = trained("source", both[:1])
    if tokenizer is None:
        tokenizer = trained("target" if own else "", both[1:] if own else both if request.pairs else both[:1])
    targets = load_tokenizer(tokenizer, eos=request.eos)
    return (load_tokenizer(source_tokenizer, eos=request.eos) if source_tokenizer is not None else targets), targets


def make(request: Request, files: list[Path], sources: Tokenizer, targets: Tokenizer, progress: Callable[[int], None]) -> dict[str, Facts]:
    """Writes the token files and returns their facts by side."""
    from megascale.data.prepare import prepare, prepare_pairs

    if request.pairs:
        keys = request.keys[0], request.keys[1]
        facts = prepare_pairs(files, request.out, (sources, targets), keys, request.workers, progress, request.longest)
        return dict(zip(SIDES, facts))
    r = request
    return {"": prepare(files, r.out, targets, r.keys[0], r.workers, r.append_eos, progress, r.bos, r.longest)}


def check_out(out: str, outputs: list[Path]) -> None:
    """Raises UsageError for an invalid prefix."""
    check_path(out)
    if not out.isprintable() or max(len(os.fsencode(part)) for p in outputs for part in p.parts) > 240 or len(os.fsencode(out)) > 4000:
        raise UsageError(f"--out {out[:80]!r} is not a prefix of files: it has unprintable characters, or too many")
    if Path(out).is_dir() or out.endswith(("/", os.sep)) or not Path(out).name:
        raise UsageError(f"--out {out} is a folder, but a prefix is needed: for example {Path(out) / 'text'}")


def check_free(outputs: list[Path], given: list[Path], overwrite: bool) -> None:
    """Raises UsageError if output exists that is neither a `given` tokenizer nor to be overwritten."""
    existing = [p for p in outputs if p.exists() and not any(p.samefile(t) for t in given)]
    folders = [p for p in existing if p.is_dir()]
    if folders:
        raise UsageError(f"{folders[0]} is a folder where a file is to be written: choose another --out")
    if existing and not overwrite:
        raise UsageError(f"{existing[0]} exists: choose another --out, or add --overwrite")


def with_progress(
    make: Callable[[Callable[[int], None]], dict[str, Facts]], files: list[Path], signs: list[Callable[[], None]], console: Console
) -> dict[str, Facts]:
    """Runs `make` with a progress bar on a terminal; calls the `signs` of life after each part."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # Refreshed manually: a refresh thread could hold a lock when the workers are forked.
    with Progress(*columns, console=console, disable=not console.is_terminal, auto_refresh=False) as bar:
        task = bar.add_task("", total=sum(f.stat().st_size for f in files if f.exists()))

        def show(done: int) -> None:
            bar.update(task, advance=done, refresh=True)
            for sign in signs:
                sign()

        return make(show)


def warnings(facts: Facts, tokenizer: Tokenizer) -> list[str]:
    """Warnings about changes to the text."""
    said: list[str] = []
    if facts.not_utf8_files:
        said.append(f"{facts.not_utf8_files} files are not valid UTF-8; what is not was replaced by U+FFFD")
    if facts.null_documents:
        said.append(f"{facts.null_documents} documents are null and were left out")
    if facts.empty_files:
        said.append(f"{facts.empty_files} of the inputs gave no document: empty, or only empty documents")
    if facts.byte_order_marks:
        said.append(f"{facts.byte_order_marks} byte-order marks at the beginning of documents were left out")
    if facts.special_tokens:
        said.append(
            f"{facts.special_tokens} tokens of the text are special ones, such as the end {tokenizer.decode([tokenizer.eos_id])!r}: their "
            "names stand in it, and this tokenizer cannot read them as text; take them out of the text if they mean nothing"
        )
    return said
