#!/usr/bin/env python3
"""Samples from a checkpoint or a Hugging Face folder; under torchrun the weights are cut over its ranks (tp)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from megascale.cli import new_app, run_tool
from megascale.comm.mesh import build_mesh
from megascale.config.layout import axis_sizes
from megascale.data.tokenizer import Tokenizer
from megascale.errors import UsageError
from megascale.formats.convert import parse_dtype
from megascale.formats.load import load_model
from megascale.formats.tokenizer_build import open_tokenizer
from megascale.generate.open import layout, open_model
from megascale.generate.run import Sampling, beyond, generate
from megascale.launch.ranks import find_ranks
from megascale.train.place import agreed, choose_device, process_group

app = new_app(__doc__ or "")


@app.command()
def main(
    checkpoint: Annotated[Path, typer.Argument(help="a folder step-…, a run, or a Hugging Face folder")],
    prompt: Annotated[list[str] | None, typer.Option(help="text to go on from; several make a batch")] = None,
    tokens: Annotated[list[str] | None, typer.Option(help="a prompt as token numbers, such as 1,5,9; several make a batch")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="draw from the fewest tokens with this probability together")] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="go on behind the token that ends a document")] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="a tokenizer's file or folder; found beside the checkpoint or its data if absent")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or fp64; the one it was trained in if absent")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object a prompt")] = False,
) -> None:
    """Prints what follows each prompt."""
    if bool(prompt) == bool(tokens):
        raise UsageError(f"--prompt is given {len(prompt or [])} times and --tokens {len(tokens or [])} times: give one of them")
    if top_p == 0.0:
        raise UsageError("--top-p is 0, and no token has that little probability: give temperature 0 for the likeliest token")
    for number, given in enumerate(prompt or []):
        check_text(number + 1, given)
    opened = open_model(checkpoint)
    text = find(tokenizer or opened.tokenizer, opened.prefix) if prompt or tokenizer else None
    prompts = [text.encode_prompt(p) for p in prompt or []] if text else [numbers(t) for t in tokens or []]
    ranks = find_ranks()
    config = layout(opened, ranks.size, device)
    where = choose_device(config, ranks)
    ends = opened.ends or (frozenset() if text is None else frozenset({text.eos_id}))
    how = Sampling(max_new_tokens, temperature, top_p, seed, frozenset() if ignore_end else ends)
    notice = beyond(opened.seq_len, prompts, max_new_tokens)
    if notice is not None and ranks.rank == 0:
        print(f"notice: {notice}", file=sys.stderr)
    with process_group(config, ranks):
        mesh = build_mesh(axis_sizes(config.parallel, ranks.size), where.type)
        model = agreed(
            lambda: load_model(
                config.model, opened.seq_len, opened.produce, mesh, config.parallel, where, parse_dtype(dtype) or opened.dtype, opened.fp8
            )
        )
        found = generate(model, prompts, how)
    for given, ids in zip(prompt or tokens or [], found):
        said = None if text is None else text.decode(ids[:-1] if ids[-1] in how.ends else ids)
        if ranks.rank == 0:
            row = json.dumps({"prompt": given, "tokens": ids, "text": said}, ensure_ascii=False)
            print(row if as_json else " ".join(map(str, ids)) if said is None else said)


def find(path: Path | None, prefix: str | None) -> Tokenizer:
    if path is None:
        raise UsageError("no tokenizer lies beside the checkpoint or its data: give --tokenizer, or prompts as numbers with --tokens")
    return open_tokenizer(path, prefix)


def check_text(number: int, prompt: str) -> None:
    """Raises UsageError for bytes that are no UTF-8, which a shell hands on as they are."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"prompt {number} is not UTF-8: give it in that encoding, or as numbers with --tokens") from None


def numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"--tokens is {text!r}: give token numbers such as 1,5,9") from None


if __name__ == "__main__":
    run_tool(app)
