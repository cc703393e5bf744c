"""Cuts a smaller model out of a trained one: the channels, neurons, heads and blocks that matter most on given tokens, or a MatFormer's
prefixes.
"""

from __future__ import annotations

from typing import Annotated

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


@app.command(epilog=examples("megascale shrink runs/large small --hidden-size 384 --num-layers 10 --data data/valid"))
def main(
    source: From,
    target: To,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[kinds.NAME.SIZE=N]...", help="sizes of one kind of layer, such as kinds.dense.ffn_size=2048"),
    ] = None,
    hidden_size: Size = None,
    num_heads: Size = None,
    num_kv_heads: Size = None,
    ffn_size: Size = None,
    num_layers: Size = None,
    kv_rank: Size = None,
    query_rank: Size = None,
    value_dim: Size = None,
    key_heads: Size = None,
    value_heads: Size = None,
    key_dim: Size = None,
    conv_size: Size = None,
    mtp_depth: Annotated[int | None, typer.Option(min=0, help="modules of multi-token prediction that stay, the first ones")] = None,
    drop_layers: Annotated[str | None, typer.Option(help="layers that go, from 0, such as 3,7")] = None,
    ffn_sizes: Annotated[str | None, typer.Option(help="a MatFormer's width per layer, such as 64,32,32,64")] = None,
    ranking: Annotated[str, typer.Option(help="importance; random or reversed for comparison")] = "importance",
    seed: int = 1234,
    report: Report = None,
    data: TokenFiles = None,
    tokens: Annotated[int, typer.Option(min=1, help="tokens for measuring importance")] = 2048,
    workers: Workers = 1,
    max_slab_mb: Slab = 256,
    trust_source: Trust = False,
) -> None:
    """Makes TARGET from SOURCE. Exit code 2 for a refusal; nothing is left half-written."""
    from megascale.expand.options import kinds_of
    from megascale.expand.shrink import shrink
    from megascale.expand.smaller import Smaller
    from megascale.expand.write import Effort

    check_report(report)
    mixed = numbers(ffn_sizes, "--ffn-sizes", "write a width per layer, such as 64,32,32,64")
    drop = numbers(drop_layers, "--drop-layers", "write the numbers of layers, such as 3,7") or ()
    asked = (
        ("kv_rank", kv_rank), ("query_rank", query_rank), ("value_dim", value_dim), ("key_heads", key_heads), ("value_heads", value_heads),
        ("key_dim", key_dim), ("conv_size", conv_size),
    )  # fmt: skip
    inner = {name: size for name, size in asked if size is not None}
    sizes = Smaller(hidden_size, num_heads, num_kv_heads, ffn_size, num_layers, mixed, mtp_depth, drop, kinds_of(changes or ()), inner)
    effort = Effort(workers, max_slab_mb << 20, tokens, not trust_source, data)
    with progress_bar() as progress:
        found = shrink(source, target, sizes, ranking, seed, effort, progress)
    write_report(report, found)
    proof = found["proof"]["transform"]
    print_sizes(found)
    print(f"{found['verdict']}: loss {proof['loss']:.4f} → {proof['loss'] + proof['loss_change']:.4f} on {found['proof']['tokens']}")
    if found["without_block"] is not None:
        print(f"layers kept: {', '.join(map(str, found['kept']['layers']))}, by the loss without each")
    print_next(target)


def numbers(text: str | None, flag: str, fix: str) -> tuple[int, ...] | None:
    """`3,7` → its numbers."""
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{flag} is {text!r}: {fix}") from None
