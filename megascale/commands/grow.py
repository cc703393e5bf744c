"""Grows a checkpoint: a larger model that continues from the smaller one, with a proof and a JSON report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from megascale.cli import examples, new_app
from megascale.commands.growing import (
    From,
    Report,
    Size,
    Slab,
    To,
    TokenFiles,
    Trust,
    Workers,
    check_report,
    print_next,
    print_sizes,
    progress_bar,
    write_report,
)  # fmt: skip
from megascale.errors import UsageError

app = new_app(__doc__ or "")


@app.command(
    epilog=examples(
        "megascale grow runs/small grown --hidden-size 512 --num-heads 8 --num-layers 12 --report grown.json",
        "megascale train grown/config.yaml checkpoint.init_from=grown checkpoint.init_schedule=lemon",
        "megascale grow runs/small grown --num-layers 24 --optimizer transform",
        "megascale grow runs/mixed grown kinds.dense.ffn_size=4096 kinds.full.num_layers=8",
    )
)
def main(
    source: From,
    target: To,
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[kinds.NAME.SIZE=N]...", help="sizes of one kind of layer, such as kinds.dense.ffn_size=8192; num_layers too"
        ),
    ] = None,
    hidden_size: Size = None,
    num_heads: Size = None,
    num_kv_heads: Size = None,
    head_dim: Size = None,
    ffn_size: Size = None,
    expert_ffn_size: Size = None,
    num_layers: Size = None,
    num_experts: Annotated[
        int | None, typer.Option(min=1, help="number of experts of the current width; dense layers become experts")
    ] = None,
    top_k: Size = None,
    granularity: Annotated[int, typer.Option(min=1, help="split each expert into this many finer ones")] = 1,
    vocab_size: Size = None,
    seq_len: Size = None,
    tokenformer_size: Size = None,
    kv_rank: Size = None,
    query_rank: Size = None,
    rope_dim: Size = None,
    value_dim: Size = None,
    key_heads: Size = None,
    value_heads: Size = None,
    key_dim: Size = None,
    conv_size: Size = None,
    mtp_depth: Annotated[int | None, typer.Option(min=1, help="modules of multi-token prediction; new ones start fresh")] = None,
    width: Annotated[str, typer.Option("--width-method", help="duplicate, zero or average: new channels of the stream")] = "duplicate",
    ffn: Annotated[str, typer.Option("--ffn-method", help="duplicate or zero")] = "duplicate",
    heads: Annotated[str, typer.Option("--heads-method", help="duplicate or zero")] = "duplicate",
    depth: Annotated[str, typer.Option("--depth-method", help="identity, cancel, stack, dus, interleave or inject")] = "identity",
    placement: Annotated[str, typer.Option(help="where inserted layers go: spread or end")] = "spread",
    symmetry: Annotated[str, typer.Option(help="what makes copies differ: project, snr:DB or none")] = "project",
    split: Annotated[str, typer.Option(help="A:B, shares of the first and of each other copy")] = "1:1",
    optimizer: Annotated[str, typer.Option(help="optimizer state: transform, reset or drop")] = "drop",
    router: Annotated[str, typer.Option(help="router of experts made from dense layers")] = "topk_softmax",
    vocabulary: Annotated[Path | None, typer.Option(help="JSON: a list with the old id, or null, for every new id")] = None,
    enable_vocabulary: Annotated[bool, typer.Option(help="let new tokens be predicted at once: not exact")] = False,
    lossless: Annotated[str, typer.Option(help="require, prefer (refuse what has an exact alternative) or off")] = "prefer",
    seed: int = 1234,
    report: Report = None,
    data: TokenFiles = None,
    tokens: Annotated[int, typer.Option(min=0, help="tokens to compare both models on; 0: no proof")] = 128,
    workers: Workers = 1,
    max_slab_mb: Slab = 256,
    trust_source: Trust = False,
) -> None:
    """Makes TARGET from SOURCE. Exit code 2 for a refusal, 3 if the source turns out to be damaged; nothing is left half-written."""
    from megascale.expand.grow import grow
    from megascale.expand.options import GrowthOptions, Sizes, kinds_of, parse_split
    from megascale.expand.write import Effort

    sizes = Sizes(
        hidden_size, num_heads, num_kv_heads, head_dim, ffn_size, expert_ffn_size, num_layers, num_experts, top_k, granularity, vocab_size,
        seq_len, tokenformer_size, kv_rank, query_rank, rope_dim, value_dim, key_heads, value_heads, key_dim, conv_size, mtp_depth,
        kinds_of(changes or ()),
    )  # fmt: skip
    options = GrowthOptions(
        width, ffn, heads, depth, placement, symmetry, parse_split(split), optimizer, router, read_vocabulary(vocabulary),
        enable_vocabulary, lossless, seed,
    )  # fmt: skip
    check_report(report)
    effort = Effort(workers, max_slab_mb << 20, tokens, not trust_source, data)
    with progress_bar() as progress:
        found = grow(source, target, sizes, options, effort, progress)
    write_report(report, found)
    print_verdict(found)
    print_next(target)


def print_verdict(found: dict[str, Any]) -> None:
    """Prints sizes, the proof, and what is not exact."""
    proof = found["proof"]
    print_sizes(found)
    if "transform" in proof:
        moved = proof["transform"]["logits_max"]
        print(
            f"{found['verdict']}: logits move by {moved:.1e} in fp64, by {proof['stored_error']:.1e} as stored and in {proof['dtype']} "
            f"(the small model's own rounding: {proof['own_error']:.1e}), on {proof['tokens']}"
        )
    for kind, lines in (("lossy", found["lossy"]), ("dead", found["dead"]), ("note", found["notes"])):
        for line in lines:
            print(f"{kind}: {line}")


def read_vocabulary(path: Path | None) -> tuple[int | None, ...] | None:
    if path is None:
        return None
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--vocabulary {path} cannot be read: {error}") from None
    if not isinstance(ids, list) or any(i is not None and type(i) is not int for i in ids):
        raise UsageError(f"--vocabulary {path} must be a list of old ids or null, one for every new id")
    return tuple(ids)
