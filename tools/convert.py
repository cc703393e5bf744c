#!/usr/bin/env python3
"""Converts models between checkpoints of megascale, Hugging Face folders, and weights of megatron-core; streaming, in bounded memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megascale.cli import new_app, run_tool
from megascale.errors import UsageError
from megascale.formats.convert import (
    ConvertOptions,
    MegatronCut,
    Report,
    find_way,
    hf_to_megascale,
    megascale_to_hf,
    megascale_to_megatron,
    megatron_to_megascale,
)

app = new_app(__doc__ or "")
# Options that only some ways read, with the value that says nothing.
READ: dict[str, tuple[object, tuple[object, ...]]] = {
    "tokens": (None, (hf_to_megascale, megascale_to_hf)),
    "tokenizer": (None, (megascale_to_hf,)),
    "no_tokenizer": (False, (hf_to_megascale, megascale_to_hf)),
    "config": (None, (megatron_to_megascale,)),
    "tp": (1, (megascale_to_megatron,)),
    "pp": (1, (megascale_to_megatron,)),
    "spec": ("te", (megascale_to_megatron,)),
    "divisible": (128, (megascale_to_megatron,)),
    "ckpt_format": ("torch", (megascale_to_megatron,)),
    "experts": ("sequential", (megascale_to_megatron,)),
}


@app.command()
def main(
    source: Annotated[Path, typer.Argument(help="a Hugging Face folder, a checkpoint of Megatron, a folder step-…, or a run")],
    target: Annotated[Path, typer.Argument(help="the folder to write, which must not exist")],
    origin: Annotated[str, typer.Option("--from", help="hf, megatron or megascale")],
    to: Annotated[str, typer.Option("--to", help="megascale, hf or megatron")],
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16, fp64; fp8 from ours to ours; what is stored if absent")] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes that write; the bytes do not depend on them")] = 1,
    tokens: Annotated[str | None, typer.Option(help="numbers such as 1,5,9: compare logits with transformers on them")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="a tokenizer's file or folder; found beside the checkpoint or its data if absent")
    ] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="leave the tokenizer's files out")] = False,
    config: Annotated[Path | None, typer.Option(help="from Megatron: a config whose sections model and train say what model it is")] = None,
    tp: Annotated[int, typer.Option(min=1, help="to Megatron: tensor ranks")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="to Megatron: pipeline ranks")] = 1,
    spec: Annotated[str, typer.Option(help="to Megatron: te where it runs with Transformer Engine, else local")] = "te",
    divisible: Annotated[int, typer.Option(min=1, help="to Megatron: --make-vocab-size-divisible-by")] = 128,
    ckpt_format: Annotated[
        str, typer.Option(help="to Megatron: torch, files of ranks, or torch_dist, a distributed checkpoint for any ranks")
    ] = "torch",
    experts: Annotated[str, typer.Option(help="to Megatron's files of ranks: grouped (--moe-grouped-gemm) or sequential")] = "sequential",
    report: Annotated[Path | None, typer.Option(help="write what is printed as JSON, too")] = None,
) -> None:
    """SRC → DST. Exit code 2, and nothing written, where anything in SRC is not understood."""
    way, kept = find_way(origin, to, dtype)
    given = {"tokens": tokens, "tokenizer": tokenizer, "config": config, "tp": tp, "pp": pp, "spec": spec, "divisible": divisible}
    given |= {"ckpt_format": ckpt_format, "experts": experts, "no_tokenizer": no_tokenizer}
    for name, (nothing, ways_of) in READ.items():
        if given[name] != nothing and way not in ways_of:
            raise UsageError(f"--{name.replace('_', '-')} is {given[name]}, and nothing from {origin} to {to} depends on it: leave it out")
    if tokenizer is not None and no_tokenizer:
        raise UsageError(f"--tokenizer is {tokenizer} and --no-tokenizer is given: leave one of them out")
    if report is not None and (report.is_dir() or not (report.parent.is_dir() or report.parent == target)):
        raise UsageError(f"--report is {report}, and no file can be written there: name one in a folder that exists")
    terminal = Console(stderr=True)

    def progress(done: int, total: int) -> None:
        if terminal.is_terminal:
            terminal.print(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB", end="\r", highlight=False)

    if spec not in ("te", "local"):
        raise UsageError(f"--spec is {spec}: give te or local")
    if ckpt_format not in ("torch", "torch_dist"):
        raise UsageError(f"--ckpt-format is {ckpt_format}: give torch or torch_dist")
    if ckpt_format == "torch_dist" and (tp, pp, experts) != (1, 1, "sequential"):
        raise UsageError(
            f"--tp is {tp}, --pp is {pp} and --experts is {experts}, and a torch_dist checkpoint loads on any ranks: leave them out"
        )
    if experts not in ("sequential", "grouped"):
        raise UsageError(f"--experts is {experts}: give sequential or grouped")
    options = ConvertOptions(
        kept,
        workers,
        tokenizer=tokenizer,
        with_tokenizer=not no_tokenizer,
        tokens=parse_tokens(tokens),
        progress=progress,
        config=config,
        cut=MegatronCut(tp, pp, spec, divisible, ckpt_format, experts),
    )
    done = way(source, target, options)
    if report is not None:
        try:
            report.write_text(json.dumps(done.plain(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{done.written} is whole, but --report {report} cannot be written: {error.strerror}") from None
    print(told(done, " (give --tokenizer to add one)" if way is megascale_to_hf else ""))


def parse_tokens(text: str | None) -> list[int] | None:
    """ "1,5,9" or "1 5 9" → numbers."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"--tokens is {text!r}: give token numbers such as 1,5,9") from None


def told(report: Report, without: str) -> str:
    """What a report says on a screen; `without`: what to do where no tokenizer is found."""
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


if __name__ == "__main__":
    run_tool(app)
