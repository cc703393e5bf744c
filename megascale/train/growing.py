"""Growth during a run: `grow` divides it into phases; between two of them the last checkpoint grows, and the run continues."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megascale.checkpoint.folders import step_name
from megascale.checkpoint.index import Damaged
from megascale.checkpoint.loader import newest
from megascale.comm.agreement import Agreement, on_all_ranks
from megascale.config.saved import CONFIG
from megascale.config.schema import Config
from megascale.launch.ranks import RankInfo
from megascale.train.faults.stop import StopFlag
from megascale.train.faults.watchdog import SAVING, Activity
from megascale.train.phases import FROM_FILES, Given, Phase, asked, run_phases
from megascale.train.setup import build_trainer
from megascale.train.start.opening import open_run
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
    opening = whole_run.enter_context(open_run(phases[0].whole, given.samples)) if len(phases) > 1 else None
    for phase in phases:
        if phase.growth is not None and Agreement().first(lambda: _over(phase)):  # noqa: B023
            continue
        trainer = open_one.enter_context(build_trainer(phase.config, ranks, stop, activity, phase=phase, opening=opening, given=given))
        yield trainer
        if phase.growth is not None:
            activity.at(phase.until, SAVING)  # allows as much time as a save
            report = on_all_ranks(lambda: _grow(phase, ranks))  # noqa: B023
            if report is not None:
                trainer.reporter.event("grow", phase.until, **report)
        open_one.close()


def _over(phase: Phase) -> bool:
    """Whether a checkpoint after this phase exists: one of the next phase, or the grown one that begins it."""
    if phase.growth is None:
        return False
    root = Path(phase.whole.run_dir) / "checkpoints"
    try:
        own = newest(root)
    except Damaged:  # all are damaged: the grown checkpoint may replace them
        own = None
        if _is_grown(phase):
            return True
    return own is not None and step_of(own) >= phase.until and (step_of(own) > phase.until or _is_grown(phase))


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
