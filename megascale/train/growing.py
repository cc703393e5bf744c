"""The trainers of a run, one for each of its phases: between two of them the config changes, or the last checkpoint grows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

from megascale.checkpoint.folders import step_name
from megascale.checkpoint.index import Damaged
from megascale.checkpoint.loader import newest
from megascale.comm.agreement import Agreement, on_all_ranks
from megascale.config.saved import CONFIG
from megascale.config.schema import Config
from megascale.data.samples import open_data
from megascale.errors import UsageError
from megascale.launch.ranks import RankInfo
from megascale.train.faults.stop import StopFlag
from megascale.train.faults.watchdog import SAVING, Activity
from megascale.train.phases import FROM_FILES, Given, Phase, asked, run_phases
from megascale.train.setup import build_trainer, continued
from megascale.train.start.opening import Opening, open_run
from megascale.train.start.resume import step_of
from megascale.train.trainer import Trainer


@contextmanager
def trainers(config: Config, ranks: RankInfo, stop: StopFlag, activity: Activity, given: Given = FROM_FILES) -> Iterator[Iterator[Trainer]]:
    """The trainers of a run in order. Train each to its end before asking for the next. Leaving the context closes the last."""
    with ExitStack() as whole_run, ExitStack() as open_one:
        yield _each(config, ranks, stop, activity, given, whole_run, open_one)


def _each(
    config: Config, ranks: RankInfo, stop: StopFlag, activity: Activity, given: Given, whole_run: ExitStack, open_one: ExitStack
) -> Iterator[Trainer]:
    phases = run_phases(config, ranks.size)
    check_memory_alone(phases, given)
    on_all_ranks(lambda: check_later_data(phases, given))
    more = len(phases) > 1 and given.writes
    opening = whole_run.enter_context(open_run(phases[0].whole, given.samples)) if more else None
    trainer: Trainer | None = None
    for phase in phases:
        if more and phase is not phases[-1] and Agreement().first(lambda: _over(phase, opening)):  # noqa: B023
            continue
        if trainer is not None and trainer.phase.flows:
            trainer = continued(trainer, phase, given)
        else:
            open_one.close()
            trainer = open_one.enter_context(build_trainer(phase.config, ranks, stop, activity, phase=phase, opening=opening, given=given))
        yield trainer
        if phase.growth is not None:
            activity.at(phase.until, SAVING)  # allows as much time as a save
            report = on_all_ranks(lambda: _grow(phase, ranks))  # noqa: B023
            if report is not None:
                trainer.reporter.event("grow", phase.until, **report)


def check_memory_alone(phases: list[Phase], given: Given) -> None:
    """Raises UsageError for a run without a directory whose phases need a checkpoint between them."""
    apart = next((b for a, b in pairwise(phases) if not a.flows), None)
    if apart is not None and not given.writes:
        raise UsageError(
            f"run_dir is None, so there are no checkpoints, but the phase from step {apart.first} on needs one: it changes more than the "
            "batch, the data, the clipping or the learning rate. Give run_dir"
        )


def check_later_data(phases: list[Phase], given: Given) -> None:
    """Raises UsageError, before the first step, for data of a later phase that cannot be used."""
    for before, phase in pairwise(phases):
        then, now = before.config, phase.config
        if (then.data, then.train.seq_len, then.train.eval_every > 0) != (now.data, now.train.seq_len, now.train.eval_every > 0):
            open_data(now, given.samples)


def _over(phase: Phase, opening: Opening | None) -> bool:
    """Whether a checkpoint after this phase exists: its last one, one of a later phase, or the grown one that begins it."""
    root = Path(phase.whole.run_dir) / "checkpoints"
    try:
        own = newest(root)
    except Damaged:  # all are damaged: the grown checkpoint may replace them
        own = None
        if phase.growth is not None and _is_grown(phase):
            return True
    if own is None and opening is not None:
        own = opening.elsewhere
    if own is None or step_of(own) < phase.until:
        return False
    return step_of(own) > phase.until or phase.growth is None or _is_grown(phase)


def _grown_folder(phase: Phase) -> Path:
    return Path(phase.whole.run_dir) / f"grown-{_number(phase)}" / step_name(phase.until)


def _is_grown(phase: Phase) -> bool:
    """Whether the growth finished: it writes its config once it is verified; a kill before leaves only the checkpoint."""
    return (_grown_folder(phase).parent / CONFIG).exists()


def _number(phase: Phase) -> int:
    """1-based index of the growth at the end of this phase."""
    return 1 + [g.step for g in phase.whole.grow].index(phase.until)


def _grow(phase: Phase, ranks: RankInfo) -> dict[str, object] | None:
    """Grows the phase's last checkpoint on the first rank. The other ranks wait at their next agreement."""
    if ranks.rank != 0 or _is_grown(phase):
        return None
    from megascale.expand.grow import grow
    from megascale.expand.write import Effort

    assert phase.growth is not None
    sizes, options = asked(phase.growth, phase.config.run.seed)
    source = Path(phase.whole.run_dir) / "checkpoints" / step_name(phase.until)
    report = grow(source, _grown_folder(phase).parent, sizes, options, Effort())
    proof = report["proof"]
    return {
        "target": report["target"],
        "verdict": report["verdict"],
        "parameters": report["parameters"],
        "logits_moved": proof["transform"]["logits_max"],
        "loss_change": proof.get("stored_loss_change"),
        "seconds": report["seconds"],
    }
