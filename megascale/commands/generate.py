"""Samples from a checkpoint or a Hugging Face folder; under torchrun the weights are sharded over its ranks (tp)."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megascale.cli import examples, new_app
from megascale.errors import UsageError

if TYPE_CHECKING:
    from megascale.data.tokenizer import Tokenizer
    from megascale.generation.open import Opened

app = new_app(__doc__ or "")


@app.command(
    epilog=examples(
        'megascale generate runs/llama-125m --prompt "Once upon"',
        "megascale generate HF_FOLDER --tokens 1,5,9 --max-new-tokens 20 --temperature 0.8 --top-p 0.9 --json",
        'torchrun --nproc-per-node 2 -m megascale generate runs/llama-125m --prompt "Once"',
    )
)
def main(
    checkpoint: Annotated[Path, typer.Argument(help="a folder step-…, a run, or a Hugging Face folder")],
    prompt: Annotated[list[str] | None, typer.Option(help="text to continue; several make a batch")] = None,
    tokens: Annotated[list[str] | None, typer.Option(help="a prompt as token ids, such as 1,5,9; several make a batch")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=1 << 40, help="most tokens to generate")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="draw from the fewest tokens that together have this probability")] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    drafts: Annotated[
        int | None,
        typer.Option(min=0, max=3, help="tokens per pass that multi-token prediction drafts; default: all it can at temperature 0"),
    ] = None,
    ema: Annotated[
        str | None, typer.Option(metavar="NAME", help="an average of optim.ema, by its decay, half-life or number from 1")
    ] = None,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="continue after the token that ends a document")] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="a tokenizer's file or folder; default: the one of the checkpoint or its data")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or fp64; default: as in training")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per prompt")] = False,
) -> None:
    """Prints a continuation of each prompt."""
    from megascale.comm.agreement import on_all_ranks
    from megascale.comm.mesh import build_mesh
    from megascale.config.layout import axis_sizes
    from megascale.formats.convert import parse_dtype
    from megascale.formats.load import load_model
    from megascale.generation.open import layout, open_model
    from megascale.generation.run import Sampling, beyond, check_not_empty, generate
    from megascale.generation.speculate import Counts
    from megascale.launch.ranks import find_ranks
    from megascale.train.device import choose_device
    from megascale.train.process_group import process_group

    if bool(prompt) == bool(tokens):
        raise UsageError(both_or_none(bool(prompt)))
    if top_p == 0.0:
        raise UsageError("--top-p is 0, but no token has that little probability: give temperature 0 for the likeliest token")
    for number, given in enumerate(prompt or []):
        check_text(number + 1, given)
    opened = open_model(checkpoint, ema)
    text = find(tokenizer or opened.tokenizer, opened.prefix) if prompt or tokenizer else None
    prompts = [text.encode_prompt(p) for p in prompt or []] if text else [numbers(t) for t in tokens or []]
    check_not_empty(prompts)
    ranks = find_ranks()
    notices = [beyond(opened.seq_len, prompts, max_new_tokens), text and of_another(text, opened)]
    for notice in filter(None, notices if ranks.rank == 0 else []):
        print(notice, file=sys.stderr)
    config = layout(opened, ranks.size, device)
    where = choose_device(config, ranks)
    ends = opened.ends or (frozenset() if text is None else frozenset({text.eos_id}))
    how = Sampling(max_new_tokens, temperature, top_p, seed, frozenset() if ignore_end else ends, drafts)
    with process_group(config, ranks):
        mesh = build_mesh(axis_sizes(config.parallel, ranks.size), where.type)
        model = on_all_ranks(
            lambda: load_model(
                config.model, opened.seq_len, opened.produce, mesh, config.parallel, where, parse_dtype(dtype) or opened.dtype, opened.fp8
            )
        )
        counts = Counts()
        found = generate(model, prompts, how, counts)
    if counts.drafted and ranks.rank == 0:
        share = counts.accepted / counts.drafted
        print(f"{counts.accepted} of {counts.drafted} drafts accepted ({share:.0%}) in {counts.passes} passes", file=sys.stderr)
    for given, ids in zip(prompt or tokens or [], found):
        said = None if text is None else text.decode(ids[:-1] if ids[-1] in how.ends else ids)
        if ranks.rank == 0:
            row = json.dumps({"prompt": given, "tokens": ids, "text": said}, ensure_ascii=False)
            print(row if as_json else " ".join(map(str, ids)) if said is None else said)


def both_or_none(both: bool) -> str:
    if both:
        return (
            "--prompt and --tokens are both given, but --tokens is a prompt as token ids: give one of them; the number of new tokens is "
            "--max-new-tokens"
        )
    return "there is no prompt: give --prompt TEXT, or --tokens with token ids"


def of_another(given: Tokenizer, opened: Opened) -> str | None:
    """A warning if the tokenizer is known not to be the model's own."""
    from megascale.data.facts import source_facts
    from megascale.formats.tokenizer_build import open_tokenizer

    own, name = None, f"{opened.prefix}.json"
    with suppress(UsageError):  # an unreadable tokenizer cannot be compared
        own = source_facts(opened.prefix).get("tokenizer_fingerprint") if opened.prefix else None
        if own is None and opened.tokenizer is not None:
            own, name = open_tokenizer(opened.tokenizer).fingerprint, str(opened.tokenizer)
    if own in (None, given.fingerprint):
        return None
    return (
        f"warning: the tokenizer {given.path} is {given.fingerprint}, but the model was trained with {own} ({name}): unless both number "
        "words alike, the output makes no sense"
    )


def find(path: Path | None, prefix: str | None) -> Tokenizer:
    from megascale.formats.tokenizer_build import open_tokenizer

    if path is None:
        raise UsageError("there is no tokenizer next to the checkpoint or its data: give --tokenizer, or prompts as numbers with --tokens")
    return open_tokenizer(path, prefix)


def check_text(number: int, prompt: str) -> None:
    """Raises UsageError for bytes that are not UTF-8, which a shell passes on."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"prompt {number} is not UTF-8: give it in that encoding, or as numbers with --tokens") from None


def numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"--tokens is {text!r}: give token numbers such as 1,5,9") from None
