"""Checks that a config's curve is the same on every layout: its model made small, trained on one process and on each layout that applies.

Needs no data and no GPU. Compared are the initial weights, the samples of each step, losses, gradients and weights after three steps, and
the bytes that ranks send beside the planner's formulas.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megascale.cli import ConfigFile, Overrides, examples, new_app
from megascale.errors import UsageError

if TYPE_CHECKING:
    from megascale.verify.run import Report, Row

app = new_app(__doc__ or "")


@app.command(
    epilog=examples(
        "megascale verify configs/llama-8b.yaml",
        "megascale verify mine.yaml --ranks 2 --random 20 --json verify.json",
        "megascale verify mine.yaml --layouts layouts.yaml optim.name=muon",
    )
)
def main(
    file: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(help="the most ranks of a layout, all on this machine", min=2, max=64)] = 4,
    layouts: Annotated[
        str,
        typer.Option(metavar="all|FILE", help="all that apply; or a YAML file: a list of names, or names with keys of `parallel`"),
    ] = "all",
    random: Annotated[int, typer.Option(help="random products of axes, schedules and recomputation beside them", min=0, max=10_000)] = 4,
    seed: Annotated[int, typer.Option(help="seed of the random products")] = 1,
    report: Annotated[Path | None, typer.Option("--json", help="also write the result as JSON")] = None,
) -> None:
    """Exit code 0 if every layout equals one process, otherwise 1."""
    from rich.console import Console

    from megascale.config.load import load_config
    from megascale.verify.run import verify

    config = load_config(file, overrides or [])
    only = None if layouts == "all" else read_layouts(Path(layouts))
    console = Console(stderr=True, highlight=False)

    def tell(number: int, count: int, row: Row) -> None:
        console.print(f"{number:3d}/{count}  {row.name}, {row.ranks} ranks: {row.wrong or 'equal'}", markup=False, soft_wrap=True)

    found = verify(config, ranks, random if only is None else 0, seed, only, tell)
    if report is not None:
        report.write_text(json.dumps(found.plain(), indent=1) + "\n", encoding="utf-8")
    show(found, config.precision.compute)
    raise typer.Exit(0 if found.equal else 1)


def read_layouts(path: Path) -> dict[str, dict[str, Any] | None]:
    """Names of layouts to the keys of `parallel`, None for a named one. Raises UsageError."""
    from megascale.config.load import parse_yaml

    try:
        found = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--layouts {path} cannot be read ({error.strerror or error}): give `all`, or a YAML file of layouts") from None
    except ValueError as error:
        raise UsageError(f"--layouts {path} is no YAML ({error}): write a list of names, or names with keys of `parallel`") from None
    if isinstance(found, list) and found and all(isinstance(name, str) for name in found):
        return dict.fromkeys(found)
    if isinstance(found, dict) and found and all(isinstance(keys, dict) for keys in found.values()):
        return {str(name): keys for name, keys in found.items()}
    raise UsageError(
        f"--layouts {path} holds a {type(found).__name__}: write a list of names, such as [fsdp, tp], or a mapping such as "
        "{mine: {tp: 2, pp: 2}}"
    )


def show(found: Report, own: str) -> None:
    """The table, then what is wrong."""
    from rich.console import Console
    from rich.table import Table

    formats = list(dict.fromkeys(("fp64", own)))
    table = Table("layout", "ranks", *formats, "bytes", "verdict")
    for row in found.rows:
        verdicts = {v.precision: f"{v.loss:.0e}  {v.grad:.0e}  {v.weight:.0e}" for v in row.verdicts}
        sent = "" if row.problem else "as planned" if row.as_planned else "not as planned"
        table.add_row(row.name, str(row.ranks), *(verdicts.get(name, "") for name in formats), sent, "equal" if row.equal else "DIFFERS")
    Console(highlight=False).print(table)
    equal = sum(row.equal for row in found.rows)
    print("largest relative difference of losses, of the first gradient, and of the weights at the end")
    print(f"{equal} of {len(found.rows)} layouts equal one process; {len(found.left_out)} do not apply; {found.seconds:.0f} s")
    for row in found.rows:
        if not row.equal:
            print(f"{row.name}: {row.wrong}")
        elif not row.as_planned:
            print(f"{row.name}: a rank sent {row.sent}, and the planner's formulas say {row.planned}")
