#!/usr/bin/env python3
"""Pretrains the model of a config: `python pretrain.py CONFIG [section.key=value …]`, also under torchrun."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.errors import MegascaleError
from megascale.launch.exits import Exit, as_exit, of_this_run, write_exit
from megascale.launch.ranks import RankInfo, find_ranks
from megascale.limits import raise_open_files
from megascale.screen import take_any_letter
from megascale.train.faults.stop import StopFlag

if TYPE_CHECKING:  # it imports torch, and signals are to be heard before that
    from megascale.train.faults.watchdog import Watchdog
    from megascale.train.trainer import Trainer


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config and the exact bytes per rank, allocate nothing",
    )
    parser.add_argument("--ranks", type=int, default=None, help="with --dry-run: as if started on so many ranks")
    parser.add_argument("--json", metavar="FILE", help="with --dry-run: write the same as JSON")
    parser.add_argument("--draw", metavar="FILE", help="with --dry-run: draw the pipeline's schedule as .png or .svg")
    args = parser.parse_intermixed_args(argv)
    if args.ranks is not None and args.ranks < 1:
        parser.error(f"--ranks is {args.ranks}: give the number of ranks, 1 or more")
    if not args.dry_run and (args.ranks is not None or args.json or args.draw):
        parser.error("--ranks, --json and --draw go with --dry-run")
    return args


def main(argv: list[str]) -> int:
    take_any_letter()
    ranks, stop = RankInfo(), StopFlag()
    config: Config | None = None
    watch: Watchdog | None = None
    trainer: Trainer | None = None
    with ExitStack() as group:  # closed last: the ranks part when exit.json is written
        try:
            args = parse(argv)
            ranks = find_ranks()
            asked = load_config(args.config, args.overrides)
            if args.dry_run:
                from megascale.train.estimate.dry_run import dry_run

                dry_run(asked, args.ranks or ranks.size, args.json, args.draw)
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
            ending = Exit(0, "done")
        except Exception as error:
            known = judged(error, trainer)
            if known is None:
                leave(config, ranks, watch, trainer, Exit(1, f"{type(error).__name__}: {error}"))
                raise
            ending = known
            if known.code in (4, 5):
                from megascale.train.faults.explain import explain

                ending = explain(known, error, watch, config, ranks)
        leave(config, ranks, watch, trainer, ending)
        if ending.code and (ranks.rank == 0 or ending.code in (4, 5)):
            with suppress(OSError):  # the terminal may be gone
                print(f"{'stopped' if ending.code == 75 else 'error'}: {ending.reason}", file=sys.stderr)
        if ending.code in (0, 75):
            final_barrier()
    return ending.code


def judged(error: Exception, trainer: Trainer | None) -> Exit | None:
    """What an error comes to; None for a bug, which keeps its traceback."""
    if isinstance(error, MegascaleError):
        return Exit(error.code, str(error))
    known = as_exit(error)
    if known is None or known.code != 2 or trainer is None:
        return known
    if not isinstance(error, OSError):
        return None
    return Exit(3, f"training cannot go on: {known.reason}; the last good checkpoint is {trainer.reporter.last_good}")


def leave(config: Config | None, ranks: RankInfo, watch: Watchdog | None, trainer: Trainer | None, ending: Exit) -> None:
    """Tells the peers and exit.json. Before the run has claimed its directory, only what its earlier attempt left there is replaced."""
    if watch is not None:
        watch.leaves(ending)
    run_dir = None if watch is None else watch.activity.run_dir
    if run_dir is None and config is not None and of_this_run(config, Path(config.run_dir)):
        run_dir = Path(config.run_dir)
    write_exit(run_dir, ending, ranks, 0 if trainer is None else trainer.progress.step)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # A lost peer must not hold this process in destructors, and ranks that stop must not drift apart in them.
    os._exit(code) if code in (4, 5, 75) else sys.exit(code)
