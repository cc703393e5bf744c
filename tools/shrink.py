#!/usr/bin/env python3
"""Cuts a smaller model out of a trained one: the channels, neurons, heads and blocks that matter most on given tokens, or a MatFormer's
prefixes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from megascale.cli import new_app, run_tool
from megascale.errors import UsageError
from megascale.expand.grow import Effort
from megascale.expand.shrink import Smaller, shrink

app = new_app(__doc__ or "")
Size = Annotated[int | None, typer.Option(min=1, rich_help_panel="sizes")]


@app.command()
def main(
    source: Annotated[Path, typer.Argument(help="a folder step-…, or a run's directory")],
    target: Annotated[Path, typer.Argument(help="a folder that does not exist yet")],
    hidden_size: Size = None,
    num_heads: Size = None,
    num_kv_heads: Size = None,
    ffn_size: Size = None,
    num_layers: Size = None,
    ffn_sizes: Annotated[str | None, typer.Option(help="a MatFormer's width for each layer, as 64,32,32,64")] = None,
    ranking: Annotated[str, typer.Option(help="importance, or random or reversed to compare with")] = "importance",
    seed: int = 1234,
    report: Annotated[Path | None, typer.Option(help="write the report there as JSON")] = None,
    data: Annotated[str | None, typer.Option(help="prefix of token files to judge by; the source's own if absent")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="to judge by")] = 2048,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    max_slab_mb: Annotated[int, typer.Option(min=1)] = 256,
    trust_source: Annotated[bool, typer.Option("--trust-source", help="do not read its files for their checksums first")] = False,
) -> None:
    """Makes TARGET from SOURCE. Exit code 2 for what is refused; nothing is left half-written."""
    if report is not None and not report.parent.is_dir():
        raise UsageError(f"--report {report}: there is no folder {report.parent}")
    try:
        mixed = None if ffn_sizes is None else tuple(int(part) for part in ffn_sizes.split(","))
    except ValueError:
        raise UsageError(f"--ffn-sizes is {ffn_sizes!r}: write a width for each layer, as 64,32,32,64") from None
    sizes = Smaller(hidden_size, num_heads, num_kv_heads, ffn_size, num_layers, mixed)
    effort = Effort(workers, max_slab_mb << 20, tokens, not trust_source, data)
    found = shrink(source, target, sizes, ranking, seed, effort)
    if report is not None:
        report.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    proof = found["proof"]["transform"]
    print(f"{found['target']}: {found['parameters']['source']:,} → {found['parameters']['target']:,} parameters, {found['seconds']} s")
    print(f"{found['verdict']}: loss {proof['loss']:.4f} → {proof['loss'] + proof['loss_change']:.4f} on {found['proof']['tokens']}")
    if found["without_block"] is not None:
        print(f"layers kept: {', '.join(map(str, found['kept']['layers']))}, by the loss without each")
    print(f"start from it: python pretrain.py {target / 'config.yaml'} checkpoint.init_from={target}")


if __name__ == "__main__":
    run_tool(app)
