"""Pretrains the model of a config, alone or as one of many ranks under torchrun, srun or mpirun.

Handles signals and reports mistakes before it imports anything slow, such as torch.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from megascale.cli import Overrides, examples, new_app
from megascale.errors import ExitCode, MegascaleError, UsageError
from megascale.launch.exits import Exit, as_exit, of_this_run, write_exit
from megascale.launch.ranks import RankInfo, find_ranks
from megascale.limits import raise_open_files
from megascale.train.faults.stop import StopFlag

if TYPE_CHECKING:  # the last two import torch, which must come after handling signals
    from megascale.config.schema import Config
    from megascale.trace.run import Asked
    from megascale.train.faults.watchdog import Watchdog
    from megascale.train.trainer import Trainer

app = new_app(__doc__ or "")
# Errors that any rank reports, with more than their own message: which rank is missing, or what would fit.
KNOWN_HERE = (ExitCode.OUT_OF_MEMORY, ExitCode.PEER_LOST)


@dataclass(frozen=True)
class DryRun:
    """Options of a dry run: number of `ranks`, a JSON file, a drawing of the pipeline's schedule."""

    ranks: int | None = None
    json: str | None = None
    draw: str | None = None
    show_config: bool = False
    device_memory: float | None = None  # GB
    trace: bool = False
    rank: str = "first"
    cluster: str | None = None


@app.command(
    epilog=examples(
        "megascale train configs/llama-125m.yaml data.train=data/train",
        "megascale train configs/llama-8b.yaml --dry-run --ranks 64 parallel.tp=2",
        "torchrun --nproc-per-node 8 -m megascale train configs/llama-125m.yaml parallel.tp=2",
    )
)
def main(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file")],  # a str, so that only rank 0 reports errors in it
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print whether the run fits, exact bytes per rank and the schedule; allocate nothing")
    ] = False,
    ranks: Annotated[int | None, typer.Option(min=1, help="with --dry-run: assume this many ranks")] = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="with --dry-run: write the same as JSON")] = None,
    draw: Annotated[str | None, typer.Option(metavar="FILE", help="with --dry-run: draw the pipeline's schedule as .png or .svg")] = None,
    show_config: Annotated[bool, typer.Option("--show-config", help="with --dry-run: print every key of the resolved config, too")] = False,
    device_memory: Annotated[float | None, typer.Option(metavar="GB", help="with --dry-run: assume this much memory per device")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="with --dry-run: run the real step on a fake device; needs no data")] = False,
    rank: Annotated[str | None, typer.Option(metavar="RANKS", help="with --trace: first, middle, last or numbers, comma between")] = None,
    cluster: Annotated[str | None, typer.Option(metavar="FILE", help="with --trace: a cluster file, if not 8 H100 a node")] = None,
) -> None:
    """Trains until the config's last step. Run the same command again to resume."""
    if not dry_run and (ranks is not None or json or draw or show_config or device_memory is not None):
        raise UsageError("--ranks, --json, --draw, --show-config and --device-memory describe a dry run: add --dry-run, or leave them out")
    if (rank is not None or cluster is not None) and not trace:
        raise UsageError("--rank and --cluster say what to trace: add --dry-run --trace, or leave them out")
    if trace and not dry_run:
        raise UsageError("--trace traces a dry run: add --dry-run, or leave it out")
    if trace and device_memory is not None:
        raise UsageError("--device-memory does not apply to --trace, whose devices are the cluster's: name a --cluster file instead")
    if device_memory is not None and not 0 < device_memory < 1e9:
        raise UsageError(f"--device-memory is {device_memory}: give the memory of a device in GB, such as 80")
    try:
        code = run(
            config,
            overrides or [],
            DryRun(ranks, json, draw, show_config, device_memory, trace, rank or "first", cluster) if dry_run else None,
        )
    except Exception:  # a bug; `run` has reported all other errors
        traceback.print_exc()
        code = 1
    end_process(code)


def run(file: str, overrides: list[str], dry: DryRun | None = None) -> int:
    """Trains, or makes a dry run. Returns the exit code; a bug keeps its exception."""
    from megascale.config.load import load_config

    ranks, stop = RankInfo(), StopFlag()
    config: Config | None = None
    watch: Watchdog | None = None
    trainer: Trainer | None = None
    with ExitStack() as group:  # closed last, so that the process group outlives writing exit.json
        try:
            ranks = find_ranks()
            asked = load_config(file, overrides)
            if dry is not None:
                from megascale.train.estimate.dry_run import dry_run

                memory = None if dry.device_memory is None else dry.device_memory * 1e9
                dry_run(asked, dry.ranks or ranks.size, dry.json, dry.draw, dry.show_config, memory, traced_as(dry))
                return 0
            config = asked
            stop.loud = ranks.rank == 0
            stop.listen()
            raise_open_files()
            from megascale.train.growing import trainers
            from megascale.train.process_group import final_barrier, process_group

            watch = group.enter_context(process_group(config, ranks))
            with trainers(config, ranks, stop, watch.activity) as phases:  # one, unless the model grows
                for trainer in phases:
                    trainer.train()
            ending = Exit(ExitCode.DONE, "done")
        except Exception as error:
            known = judged(error, trainer)
            if known is None:
                leave(config, ranks, watch, trainer, Exit(ExitCode.BUG, f"{type(error).__name__}: {error}"))
                raise
            ending = known
            if known.code in KNOWN_HERE:
                from megascale.train.faults.explain import explain

                ending = explain(known, error, watch, config, ranks)
        leave(config, ranks, watch, trainer, ending)
        if ending.code and (ranks.rank == 0 or ending.code in KNOWN_HERE):
            with suppress(OSError):  # the terminal may be gone
                print(f"{'stopped' if ending.code == ExitCode.STOPPED else 'error'}: {ending.reason}", file=sys.stderr)
        if ending.code in (ExitCode.DONE, ExitCode.STOPPED):
            final_barrier()
    return ending.code


def traced_as(dry: DryRun) -> Asked | None:
    from megascale.trace.run import Asked

    return Asked(dry.rank, dry.cluster) if dry.trace else None


def judged(error: Exception, trainer: Trainer | None) -> Exit | None:
    """The ending for an error; None for a bug, which keeps its traceback."""
    if isinstance(error, MegascaleError):
        return Exit(error.code, str(error))
    known = as_exit(error)
    if known is None or known.code != ExitCode.USAGE or trainer is None:
        return known
    if not isinstance(error, OSError):
        return None
    return Exit(ExitCode.TRAINING, f"training cannot continue: {known.reason}; the last good checkpoint is {trainer.reporter.last_good}")


def leave(config: Config | None, ranks: RankInfo, watch: Watchdog | None, trainer: Trainer | None, ending: Exit) -> None:
    """Records the end for peers and in exit.json. Before the run has claimed its directory, replaces only an earlier attempt's file."""
    if watch is not None:
        watch.leaves(ending)
    run_dir = None if watch is None else watch.activity.run_dir
    if run_dir is None and config is not None and of_this_run(config, Path(config.run_dir)):
        run_dir = Path(config.run_dir)
    write_exit(run_dir, ending, ranks, 0 if trainer is None else trainer.progress.step)


def end_process(code: int) -> NoReturn:
    """Exits without destructors: they could wait for a lost peer, and ranks that stop must end together."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if code in (*KNOWN_HERE, ExitCode.STOPPED):
        os._exit(code)
    raise SystemExit(code)
