"""Begins a new run at a checkpoint of another one: a decay, other data, another rate. The checkpoint's files are shared by hard links."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megascale.cli import Overrides, examples, new_app
from megascale.sizes import byte_words

app = new_app(__doc__ or "")


@app.command(
    epilog=examples(
        "megascale branch runs/trunk --at 20000 --out runs/decay optim.decay=1-sqrt train.steps=22000",
        "megascale branch runs/trunk --at 20000 --out runs/books data.train=data/books optim.lr=1e-4",
    )
)
def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="directory of the run to branch from")],
    overrides: Overrides = None,
    at: Annotated[int | None, typer.Option("--at", metavar="STEP", min=1, help="step of one of its checkpoints")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="directory of the new run, which does not exist yet")] = None,
) -> None:
    """Makes the new run's directory; `megascale train FOLDER/config.yaml` trains it."""
    from megascale.checkpoint.trunk import branch
    from megascale.errors import UsageError

    if at is None or out is None:
        raise UsageError("branch needs --at STEP and --out FOLDER: the step of a checkpoint, and the directory of the new run")
    made = branch(run, at, out, overrides or [])
    changes = ", ".join(f"{key} {value}" for key, value in made["changes"].items()) or "nothing that changes the curve"
    print(f"{out} begins after step {at} of {run} and changes {changes}")
    if made["dropped"]:
        print(f"  {made['dropped']} later phases of the trunk are left out")
    if made["copied"]:
        print(f"  {byte_words(made['copied'])} of its checkpoint were copied, since hard links do not reach there")
    else:
        print(f"  {byte_words(made['linked'])} of its checkpoint are shared with the trunk by hard links")
    print(f"next: megascale train {made['config']}")
