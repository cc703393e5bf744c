"""Converts models between checkpoints of megascale, Hugging Face folders, and weights of megatron-core; streaming, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megascale.cli import examples, new_app
from megascale.errors import UsageError
from megascale.sizes import byte_words

if TYPE_CHECKING:
    from megascale.formats.convert import Report

app = new_app(__doc__ or "")
FROM_HF, TO_HF, FROM_MEGATRON, TO_MEGATRON = (
    ("hf", "megascale"),
    ("megascale", "hf"),
    ("megatron", "megascale"),
    ("megascale", "megatron"),
)
FP8 = ("megascale", "megascale")  # with --dtype fp8
WAYS = (FROM_HF, TO_HF, FROM_MEGATRON, TO_MEGATRON)
# Options that only some conversions use, with their defaults.
READ: dict[str, tuple[object, tuple[tuple[str, str], ...]]] = {
    "tokens": (None, (FROM_HF, TO_HF)),
    "tokenizer": (None, (TO_HF,)),
    "no_tokenizer": (False, (FROM_HF, TO_HF)),
    "config": (None, (FROM_MEGATRON,)),
    "tp": (1, (TO_MEGATRON,)),
    "pp": (1, (TO_MEGATRON,)),
    "spec": ("te", (TO_MEGATRON,)),
    "divisible": (128, (TO_MEGATRON,)),
    "ckpt_format": ("torch", (TO_MEGATRON,)),
    "experts": ("sequential", (TO_MEGATRON,)),
    "ema": (None, (TO_HF, TO_MEGATRON, FP8)),
}
CHOICES = {"spec": ("te", "local"), "ckpt_format": ("torch", "torch_dist"), "experts": ("sequential", "grouped")}


def print_families(asked: bool) -> None:
    if asked:
        from megascale.formats.hf.families_table import markdown_table

        print(markdown_table())
        raise typer.Exit


@app.command(
    epilog=examples(
        "megascale convert HF_FOLDER ours --from hf --to megascale",
        "megascale convert runs/llama-125m exported --from megascale --to hf --tokens 1,5,9",
        "megascale convert runs/llama-125m averaged --from megascale --to hf --ema 0.999",
        "megascale convert ours megatron --from megascale --to megatron --tp 2 --ckpt-format torch_dist",
    )
)
def main(
    source: Annotated[Path, typer.Argument(help="a Hugging Face folder, a checkpoint of Megatron, a folder step-…, or a run")],
    target: Annotated[Path, typer.Argument(help="the folder to write, which must not exist")],
    origin: Annotated[str, typer.Option("--from", help="hf, megatron or megascale")],
    to: Annotated[str, typer.Option("--to", help="megascale, hf or megatron")],
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16, fp64; fp8 from megascale to megascale; as stored if absent")] = None,
    workers: Annotated[int, typer.Option(min=1, help="writing processes; the bytes do not depend on their number")] = 1,
    tokens: Annotated[str | None, typer.Option(help="token ids such as 1,5,9 on which to compare logits with transformers")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="a tokenizer's file or folder; default: the one of the checkpoint or its data")
    ] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="leave the tokenizer's files out")] = False,
    config: Annotated[Path | None, typer.Option(help="from Megatron: a config whose sections model and train describe the model")] = None,
    tp: Annotated[int, typer.Option(min=1, help="to Megatron: tensor ranks")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="to Megatron: pipeline ranks")] = 1,
    spec: Annotated[str, typer.Option(help="to Megatron: te if Megatron runs with Transformer Engine, otherwise local")] = "te",
    divisible: Annotated[int, typer.Option(min=1, help="to Megatron: --make-vocab-size-divisible-by")] = 128,
    ckpt_format: Annotated[
        str, typer.Option(help="to Megatron: torch, files of ranks, or torch_dist, a distributed checkpoint for any ranks")
    ] = "torch",
    experts: Annotated[str, typer.Option(help="to Megatron's torch format: grouped (--moe-grouped-gemm) or sequential")] = "sequential",
    ema: Annotated[
        str | None, typer.Option(metavar="NAME", help="from a run: an average of optim.ema, by its decay, half-life or number from 1")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="also write the output as JSON")] = None,
    families: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=print_families, help="print the Hugging Face families, and stop")
    ] = False,
) -> None:
    """Converts SRC to DST. Exit code 2, and nothing written, if anything in SRC is unknown."""
    way = (origin, to)
    given = {"tokens": tokens, "tokenizer": tokenizer, "config": config, "tp": tp, "pp": pp, "spec": spec, "divisible": divisible}
    given |= {"ckpt_format": ckpt_format, "experts": experts, "no_tokenizer": no_tokenizer, "ema": ema}
    check_options(way, dtype, given)
    if report is not None and (report.is_dir() or not (report.parent.is_dir() or report.parent == target)):
        raise UsageError(f"--report is {report}, but no file can be written there: name one in a folder that exists")
    from megascale.formats.convert import ConvertOptions, MegatronCut, find_way

    convert, stored = find_way(origin, to, dtype)
    options = ConvertOptions(
        stored,
        workers,
        tokenizer=tokenizer,
        with_tokenizer=not no_tokenizer,
        tokens=parse_tokens(tokens),
        progress=progress_line(),
        config=config,
        cut=MegatronCut(tp, pp, spec, divisible, ckpt_format, experts),
        ema=ema,
    )
    done = convert(source, target, options)
    if report is not None:
        try:
            report.write_text(json.dumps(done.plain(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{done.written} is whole, but --report {report} cannot be written: {error.strerror}") from None
    print(told(done, " (give --tokenizer to add one)" if way == TO_HF else ""))


def check_options(way: tuple[str, str], dtype: str | None, given: dict[str, Any]) -> None:
    """Raises UsageError for an unsupported conversion, and for options that it does not use."""
    origin, to = way
    if way not in WAYS and (way != FP8 or dtype != "fp8"):
        ways = ", ".join(f"--from {a} --to {b}" for a, b in WAYS)
        raise UsageError(f"--from is {origin} and --to is {to}: give one of {ways}, or --from megascale --to megascale --dtype fp8")
    for name, (nothing, ways_of) in READ.items():
        if given[name] != nothing and way not in ways_of:
            raise UsageError(f"--{name.replace('_', '-')} is {given[name]}, and nothing from {origin} to {to} depends on it: leave it out")
    if given["tokenizer"] is not None and given["no_tokenizer"]:
        raise UsageError(f"--tokenizer is {given['tokenizer']} but --no-tokenizer is given: leave one of them out")
    for name, choices in CHOICES.items():
        if given[name] not in choices:
            raise UsageError(f"--{name.replace('_', '-')} is {given[name]}: give {' or '.join(choices)}")
    tp, pp, experts = given["tp"], given["pp"], given["experts"]
    if given["ckpt_format"] == "torch_dist" and (tp, pp, experts) != (1, 1, "sequential"):
        raise UsageError(
            f"--tp is {tp}, --pp is {pp} and --experts is {experts}, but a torch_dist checkpoint loads on any ranks: leave them out"
        )


def progress_line() -> Callable[[int, int], None]:
    """Shows bytes done on a terminal."""
    from rich.console import Console

    terminal = Console(stderr=True)

    def progress(done: int, total: int) -> None:
        if terminal.is_terminal:
            terminal.print(f"{byte_words(done)} of {byte_words(total)}   ", end="\r", highlight=False)

    return progress


def parse_tokens(text: str | None) -> list[int] | None:
    """ "1,5,9" or "1 5 9" → numbers."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"--tokens is {text!r}: give token numbers such as 1,5,9") from None


def told(report: Report, without: str) -> str:
    """A report as text; `without`: advice if no tokenizer is found."""
    logits = "not compared (give --tokens to compare them with transformers)"
    if report.logits is not None:
        logits = f"{report.logits:.3g} is the largest difference from transformers in fp32"
    return "\n".join(
        [
            f"{report.source} → {report.written}",
            f"  model: {report.model}, {report.parameters:,} parameters in {report.tensors} tensors",
            f"  bytes: {report.bytes:,} as {', '.join(report.dtypes)}",
            f"  tokenizer: {report.tokenizer or f'none found{without}'}",
            f"  logits: {logits}",
            *(f"  note: {note}" for note in report.notes),
        ]
    )
