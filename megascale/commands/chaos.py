"""Trains a config while killing, stopping and freezing its ranks and damaging its files, and compares the curve with an undisturbed run."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megascale.chaos.chain import Attempt, Layout, Plan, disturbed, layouts_of, losses, undisturbed
from megascale.chaos.verdict import gap, problems
from megascale.cli import Overrides, examples, new_app
from megascale.config.load import load_config
from megascale.config.support import check
from megascale.errors import TrainingError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

LIMIT = 30.0  # default seconds of run.collective_timeout, so that a frozen rank is detected soon
SPREADS = ((), ("parallel.tp=2",), ("parallel.cp=2",), ("parallel.pp=2",), ("parallel.dp_replicate=2", "parallel.dp_shard=-1"))
app = new_app(__doc__ or "")


@app.command(epilog=examples("megascale chaos small.yaml --faults 60 --minutes 10 --mixed --out runs/chaos"))
def main(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a small run on CPUs")],
    overrides: Overrides = None,
    faults: Annotated[int, typer.Option(help="number of faults to inject", min=1, max=10_000)] = 100,
    minutes: Annotated[float, typer.Option(help="minutes after which no more faults are injected", min=0.1, max=1e4)] = 30.0,
    seed: Annotated[int, typer.Option(help="seed of the order of faults")] = 1,
    ranks: Annotated[int, typer.Option(help="ranks of every attempt; with --mixed, the most", min=1, max=64)] = 2,
    mixed: Annotated[bool, typer.Option(help="use another layout and number of ranks for each attempt")] = False,
    out: Annotated[Path, typer.Option(help="folder for both runs, their output and the picture")] = Path("runs/chaos"),
    report: Annotated[Path | None, typer.Option("--json", help="write attempts and verdict here")] = None,
) -> None:
    """Exit code 0 if the curve equals that of the undisturbed run and nothing went wrong, otherwise 1."""
    from rich.console import Console

    from megascale.chaos.draw import draw
    from megascale.chaos.faults import remove

    console, more = Console(stderr=True, highlight=False), list(overrides or ())
    if not any(o.startswith("run.collective_timeout=") for o in more):
        more.append(f"run.collective_timeout={LIMIT}")
    more += ["train.log_every=1", "run.device=cpu", "checkpoint.resume=auto"]
    resolved = load_config(config, more)
    if not resolved.checkpoint.every:
        raise UsageError("checkpoint.every is 0, so every fault would cost the whole run: give a number of steps")
    layouts = choose_layouts(config, more, ranks, mixed)
    arguments = (str(config.absolute()), *more)
    plan = Plan(arguments, layouts, resolved.train.total_steps, resolved.run.collective_timeout, faults, minutes, seed)
    calm, run = out.absolute() / "undisturbed", out.absolute() / "disturbed"
    for folder in (calm, run):
        remove(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be created ({error.strerror}): name a folder that you may write to") from None
    console.print(f"the undisturbed run first: {plan.steps} steps, {layouts[0]}")
    begun = time.monotonic()
    reference = undisturbed(plan, calm)
    if (codes := reference.wait(60 * minutes)) is None or any(codes):
        reference.kill()
        raise TrainingError(f"the undisturbed run failed (codes {codes}), see {reference.logs[0]}")
    plan = replace(plan, calm=time.monotonic() - begun)
    attempts: list[Attempt] = []
    for attempt in disturbed(plan, run):
        attempts.append(attempt)
        console.print(describe(attempt))
    expected, same = losses(calm), len({(x.ranks, x.overrides) for x in layouts}) == 1
    wrong = problems(expected, run, attempts, same)
    console.print(table(attempts))
    draw(expected, losses(run), attempts, out / "chaos.png")
    worst = gap(expected, losses(run))
    total = sum(len(a.faults) for a in attempts)
    if report is not None:
        record = {"faults": total, "gap": worst if worst < float("inf") else None, "problems": wrong, "seed": seed}
        report.write_text(json.dumps({**record, "attempts": [asdict(a) for a in attempts]}, indent=1) + "\n", encoding="utf-8")
    print(
        f"{total} faults in {len(attempts)} attempts; largest relative difference of the loss {worst:.1e}; picture in {out / 'chaos.png'}"
    )
    for sentence in wrong:
        print(f"problem: {sentence}")
    raise typer.Exit(1 if wrong else 0)


def choose_layouts(config: Path, overrides: list[str], ranks: int, mixed: bool) -> tuple[Layout, ...]:
    """The layouts for attempts: the config's own on `ranks`, or with `mixed` all that the rules allow on up to that many."""
    sizes: list[int] = []
    spreads: list[tuple[str, ...]] = []
    for size in range(1, ranks + 1) if mixed else (ranks,):
        for spread in SPREADS if mixed and size > 1 else ((),):
            try:
                check(load_config(config, [*overrides, *spread]), size)
            except UsageError:
                continue
            sizes.append(size)
            spreads.append(spread)
    if not sizes:
        check(load_config(config, overrides), ranks)  # raises with the reason
    return layouts_of(sizes, spreads)


def describe(attempt: Attempt) -> str:
    """One line of progress."""
    faults = "; ".join(attempt.faults) or "undisturbed"
    return f"{attempt.number:4d}  step {attempt.before} → {attempt.after}  {attempt.layout}: {faults}  → {attempt.codes}"


def table(attempts: list[Attempt]) -> Table:
    """How often each fault was injected, and the exit codes of the attempts that it hit."""
    from rich.table import Table

    rows: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        for fault in attempt.faults:
            rows.setdefault(fault, []).append(attempt)
    made = Table("fault", "times", "exit codes of the attempts")
    for fault, met in sorted(rows.items()):
        codes = sorted({c for a in met for c in (a.codes or [])})
        made.add_row(fault, str(len(met)), ", ".join(str(c) for c in codes) or "hung")
    return made
