"""From a config to a trainer, in this order: ranks, mesh, data, model, passes, optimizer, checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megascale.checkpoint.index import read_index
from megascale.checkpoint.loader import check_files, load
from megascale.checkpoint.saver import Checkpointer, NoCheckpoints
from megascale.comm.agreement import Agreement, on_all_ranks
from megascale.comm.host import event_on
from megascale.comm.mesh import Mesh, build_mesh
from megascale.config.identity import identity
from megascale.config.layout import axis_sizes, describe
from megascale.config.schema import Config
from megascale.data.loader import Batch, Prefetcher
from megascale.data.samples import (
    Samples,
    continue_samples,
    document_lengths,
    drawn_before,
    drawn_so,
    micro_batches,
    note,
    open_data,
    overlap_note,
    prints_of,
    valid_notes,
)
from megascale.errors import UsageError
from megascale.evaluation.in_run import Evaluations, open_evaluations
from megascale.formats.export import export_beside
from megascale.formats.hf.folder import is_hf_folder
from megascale.formats.load import fill
from megascale.launch.environment import FLIGHT
from megascale.launch.ranks import RankInfo
from megascale.measure.compute import peak_flops
from megascale.parallel.model import ParallelModel
from megascale.plugins import versions
from megascale.train.build import build_engine, build_model, check_offload_dir, check_torch
from megascale.train.device import choose_device
from megascale.train.engines.engine import Engine, Native
from megascale.train.estimate.memory import check_host_room, resident_bytes
from megascale.train.faults.stop import StopFlag
from megascale.train.faults.watchdog import Activity
from megascale.train.gpu import check_room
from megascale.train.log.announce import announce
from megascale.train.log.console import Console
from megascale.train.log.module_metrics import MetricsOverRanks
from megascale.train.log.reporter import Reporter
from megascale.train.log.run_log import RunLog
from megascale.train.log.step_metrics import step_metrics
from megascale.train.phases import FROM_FILES, Given, Phase, run_phases
from megascale.train.start.alike import check_data
from megascale.train.start.changes import Prints, sources_of
from megascale.train.start.opening import STOP, Opening, claim_run_dir, open_run
from megascale.train.start.resume import RunStart, check_coefficients, find_start, is_own, model_changes
from megascale.train.start.room import room_for
from megascale.train.start.rows import check_rows
from megascale.train.state import Progress, check_finite, of_average
from megascale.train.trainer import Trainer


@contextmanager
def build_trainer(
    config: Config,
    ranks: RankInfo,
    stop: StopFlag | None = None,
    activity: Activity | None = None,
    *,
    phase: Phase | None = None,
    opening: Opening | None = None,
    given: Given = FROM_FILES,
) -> Iterator[Trainer]:
    """Builds everything a run needs before its first step. Only the lock is written before all ranks agree that the run can start.

    stop      the flag that signals set, if the caller already listens
    activity  where the trainer reports what it does, for a watchdog
    phase     the part of the run, with a resolved config; default: the first one of `config`
    opening   the run's directory, if this job already owns it
    given     what a Python program passes in addition to the config
    """
    with ExitStack() as until_the_end:
        phase = phase or run_phases(config, ranks.size)[0]
        yield _built(phase, ranks, stop or StopFlag(), activity or Activity(), opening, given, until_the_end)


def _built(
    phase: Phase, ranks: RankInfo, stop: StopFlag, activity: Activity, opening: Opening | None, given: Given, until_the_end: ExitStack
) -> Trainer:
    config = phase.config
    device = checked_device(config, ranks)
    run_dir = Path(config.run_dir) if given.writes else None
    first = ranks.rank == 0
    if opening is None:
        opening = until_the_end.enter_context(open_run(phase.whole, given.samples)) if given.writes else Opening(None)
    mixture, valid_sets = on_all_ranks(lambda: open_data(config, given.samples))
    prints = on_all_ranks(lambda: prints_of(config, given.samples))
    check_data(config, prints)
    tasks = on_all_ranks(lambda: open_evaluations(config))
    start = find_start(phase, run_dir, prints, opening.elsewhere)
    mesh = build_mesh(axis_sizes(config.parallel, ranks.size), device.type, config.parallel.heads_over)
    model, facts, flops = on_all_ranks(lambda: build_model(config, mesh, device, document_lengths(config, mixture)))
    for _ in model.draw_weights(config.run.seed):
        pass
    engine = build_engine(model, config, device)
    progress = load_start(config, start, engine, mixture)
    on_all_ranks(lambda: check_coefficients(config, model, start.folder) if start.folder is not None else None)
    Agreement().same((progress.step, progress.samples), "the step and the position in the data after loading")
    found = on_all_ranks(lambda: claim_run_dir(phase.whole, run_dir, opening) if first and run_dir is not None else [])
    activity.run_dir = run_dir  # from here on this attempt's end is written there
    if run_dir is not None and device.type == "cuda":
        (run_dir / FLIGHT).mkdir(exist_ok=True)  # NCCL writes there and makes no folder
    console = Console(config.train.total_steps, progress.step, given.quiet) if first else None
    log = on_all_ranks(lambda: RunLog(run_dir, progress.step, console.warn) if console is not None else None)
    if log is not None and console is not None:
        until_the_end.callback(log.close)
        until_the_end.callback(console.close)
        room = [] if run_dir is None else room_for(config, run_dir, start, progress.step, phase.until)
        notes, opening.notes = (*opening.notes, *start.notes, *found, *room), []
        data_notes = (note(mixture), overlap_note(prints), *valid_notes(config, valid_sets))
        announce(config, ranks, facts, start, progress, data_notes, notes, log, console)
    kept = provenance(phase, prints, mixture)
    reporter = build_reporter(config, ranks, mesh, device, model, flops, start, kept, log, console, given.writes or not given.quiet)
    if phase.begun and progress.step + 1 == phase.begun[-1][0]:
        reporter.phase(progress.step, phase.begun[-1][1])
    add_loggers(config, progress, log)
    batches = prefetch(config, mixture, progress, phase.until, mesh, device)
    valid = {name: partial(valid_batches, config, m, mesh, device) for name, m in valid_sets.items()}
    on_all_ranks(lambda: [make(0) for make in valid.values()])  # errors in a set appear now, not at its first evaluation
    checkpointer = NoCheckpoints() if run_dir is None else build_checkpointer(config, run_dir, model, opening)
    stop.file = run_dir / STOP if first and run_dir is not None else None
    connect(activity, stop, mesh, device)
    until_the_end.callback(lambda: reporter.checkpoints(checkpointer.finish(), progress.step))
    until_the_end.callback(batches.close)
    return Trainer(
        config=config,
        model=model,
        engine=engine,
        batches=batches,
        valid=valid,
        checkpointer=checkpointer,
        reporter=reporter,
        stop=stop,
        activity=activity,
        progress=progress,
        device=device,
        phase=phase,
        evaluations=Evaluations(config, tasks, model, device),
        saved=progress.step if run_dir is not None and own_checkpoint(start, run_dir) else None,
    )


def continued(trainer: Trainer, phase: Phase, given: Given) -> Trainer:
    """The trainer of a phase that goes on with the model and the optimizer of `trainer`, which is at its end. Collective."""
    config, model, progress, reporter = phase.config, trainer.model, trainer.progress, trainer.reporter
    trainer.batches.close()
    reporter.flush()
    mixture, valid_sets = on_all_ranks(lambda: open_data(config, given.samples))
    prints = on_all_ranks(lambda: prints_of(config, given.samples))
    check_data(config, prints)
    drawn = drawn_before(mixture, {**progress.plain(), **reporter.provenance})
    continue_samples(mixture, drawn)
    progress.drawn = [segment.plain() for segment in drawn]
    reporter.cfg, reporter.provenance = config.train, provenance(phase, prints, mixture)
    reporter.phase(progress.step, phase.begun[-1][1])
    if isinstance(trainer.engine, Native):
        trainer.engine.clip = config.train.clip
    batches = prefetch(config, mixture, progress, phase.until, model.mesh, trainer.device)
    valid = {name: partial(valid_batches, config, m, model.mesh, trainer.device) for name, m in valid_sets.items()}
    on_all_ranks(lambda: [make(0) for make in valid.values()])
    return Trainer(
        config=config,
        model=model,
        engine=trainer.engine,
        batches=batches,
        valid=valid,
        checkpointer=trainer.checkpointer,
        reporter=reporter,
        stop=trainer.stop,
        activity=trainer.activity,
        progress=progress,
        device=trainer.device,
        phase=phase,
        evaluations=Evaluations(config, on_all_ranks(lambda: open_evaluations(config)), model, trainer.device),
        saved=trainer.saved,
        gate=trainer.gate,
    )


def checked_device(config: Config, ranks: RankInfo) -> torch.device:
    """This rank's device. Raises UsageError on all ranks alike if a machine or its torch cannot do what the config asks."""
    on_all_ranks(lambda: check_torch(config))
    on_all_ranks(lambda: check_rows(config))
    device = on_all_ranks(lambda: choose_device(config, ranks))
    on_all_ranks(lambda: check_offload_dir(config))
    on_all_ranks(lambda: check_host_room(config, ranks))
    on_all_ranks(lambda: check_room(config, ranks, device, partial(resident_bytes, config, ranks.size)))
    return device


def add_loggers(config: Config, progress: Progress, log: RunLog | None) -> None:
    """Adds the outside loggers that the config asks for; only the first rank has a `log`. Collective."""
    if config.run.tensorboard:
        on_all_ranks(lambda: log.add_tensorboard(progress.step) if log is not None else None)
    if config.run.wandb:
        known = progress.logger_ids.get("wandb", "")
        progress.logger_ids["wandb"] = on_all_ranks(lambda: log.add_wandb(config.run.name, config.plain(), known or None) if log else known)


def prefetch(config: Config, samples: Samples, progress: Progress, until: int, mesh: Mesh, device: torch.device) -> Prefetcher:
    """Prefetches this rank's micro-batches of the steps after `progress` up to `until`."""
    batch = config.train.global_batch_size
    origin = progress.samples - progress.step * batch
    return Prefetcher(lambda step: micro_batches(config, samples, origin + (step - 1) * batch, mesh, device), progress.step + 1, until)


def connect(activity: Activity, stop: StopFlag, mesh: Mesh, device: torch.device) -> None:
    """Connects the watchdog and the gates to the run."""
    activity.traffic, activity.stop = mesh.traffic, stop
    if device.type != "cpu":
        mesh.traffic.mark = partial(event_on, device)
    if mesh.size == 1:
        activity.gate.asked = stop.heard_of


def own_checkpoint(start: RunStart, run_dir: Path) -> bool:
    """Whether a run continues from a checkpoint in its own directory."""
    if start.folder is None or start.weights_only:
        return False
    return start.folder.resolve().parent == (run_dir / "checkpoints").resolve()


def load_start(config: Config, start: RunStart, engine: Engine, samples: Samples) -> Progress:
    """Loads the engine's state from where the run starts, and continues `samples` there. Returns the progress; a new run has none."""
    if start.folder is None:
        return Progress()
    state = engine.pieces()
    if start.weights_only:
        state = {name: piece for name, piece in state.items() if name.startswith("model.")}
    saved: dict[str, Any] = {}
    if start.foreign is not None:
        folder = start.folder
        if not is_hf_folder(folder):
            index = on_all_ranks(lambda: read_index(folder))
            check_files(index, index.files, Agreement())
        produce = start.foreign.produce
        on_all_ranks(lambda: fill(state, produce))
    else:
        try:
            saved = load(start.folder, state, prefix="model." if start.weights_only else None, checked=start.checked, free=of_average)
        except UsageError as error:
            raise UsageError(f"{error}{model_changes(config, start.folder)}") from None
    on_all_ranks(lambda: check_finite(state, start.folder))
    engine.loaded(state)
    if start.weights_only:
        saved = {"samples": start.samples, "drawn": list(start.drawn)}
    drawn = on_all_ranks(lambda: drawn_before(samples, saved))
    on_all_ranks(lambda: continue_samples(samples, drawn))
    saved["drawn"] = [segment.plain() for segment in drawn]
    progress = Progress(**{k: saved[k] for k in Progress().plain() if k in saved})
    if start.weights_only:
        return progress
    # Outside loggers identify a run by its id: two runs with one id would share a curve.
    return progress if is_own(config, start.folder, saved) else replace(progress, logger_ids={})


def valid_batches(config: Config, samples: Samples, mesh: Mesh, device: torch.device, step: int) -> list[Batch]:
    """This rank's micro-batches of one evaluation step, counted from 0."""
    return micro_batches(config, samples, step * config.train.global_batch_size, mesh, device)


def provenance(phase: Phase, prints: Prints, samples: Samples) -> dict[str, Any]:
    """What every checkpoint of a phase records beside the progress."""
    config = phase.config
    mixture = {k: v for k, v in drawn_so(samples, 0).plain().items() if k != "end"}
    return {
        "identity": identity(config),
        "config": config.plain(),
        "sources": sources_of(config),
        "mixture": mixture,
        "phases": [list(entry) for entry in phase.begun],
        "fingerprints": prints,
        "layout": describe(config.parallel),
        "torch": torch.__version__,
        "plugins": versions(),
    }


def build_reporter(
    config: Config,
    ranks: RankInfo,
    mesh: Mesh,
    device: torch.device,
    model: ParallelModel,
    flops: float,
    start: RunStart,
    kept: dict[str, Any],
    log: RunLog | None,
    console: Console | None,
    measured: bool,
) -> Reporter:
    """`flops`: per token in training; `measured`: whether anything logs MFU. Only the first rank has a log and a console."""
    peak = config.run.peak_tflops * 1e12 if config.run.peak_tflops else None
    if peak is None and measured:
        peak = peak_flops(device, model.model.shape.compute)
    return Reporter(
        mesh=mesh,
        device=device,
        cfg=config.train,
        last_step=config.train.total_steps,
        flops_per_token=flops,
        peak=peak,
        observed=MetricsOverRanks(model),
        log=log,
        console=console,
        provenance=kept,
        metrics=step_metrics(),
        profile_step=config.run.profile_step,
        profile_path=str(Path(config.run_dir) / f"trace-rank{ranks.rank}.json"),
        last_good=f"{start.folder}" if start.folder is not None else "none",
    )


def build_checkpointer(config: Config, run_dir: Path, model: ParallelModel, opening: Opening) -> Checkpointer:
    keep = config.checkpoint
    return Checkpointer(
        run_dir / "checkpoints",
        keep_last=keep.keep_last,
        keep_every=keep.keep_every,
        asynchronous=keep.asynchronous,
        export=partial(export_beside, dtype=model.model.shape.compute) if keep.export == "hf" else None,
        guard=opening.guard,
    )
