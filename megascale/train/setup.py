"""From a config to a trainer, in the order of ARCHITECTURE: ranks, mesh, data, model, passes, optimizer, checkpoint."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from megascale.checkpoint.loader import load
from megascale.checkpoint.saver import Checkpointer
from megascale.comm.group import join, open_store
from megascale.comm.mesh import Mesh, build_mesh
from megascale.config.identity import identity
from megascale.config.layout import axis_sizes, describe
from megascale.config.load import to_yaml
from megascale.config.schema import Config, Parallel, Precision, any_layer
from megascale.config.support import check, padding_note
from megascale.data.loader import Prefetcher
from megascale.errors import MegascaleError, UsageError
from megascale.formats.export import export_beside
from megascale.formats.load import fill
from megascale.launch.ranks import RankInfo, node_name
from megascale.measure.compute import flops_per_token, peak_flops
from megascale.model.families import build_part
from megascale.model.kernels import choose_kernels
from megascale.model.layers import Fp8
from megascale.model.spec import active_parameters, specs_of
from megascale.optim.clip import norm_factors
from megascale.optim.optimizers import build_optimizer
from megascale.optim.schedule import begun_again
from megascale.parallel.apply import ParallelModel, build_stages, parallelize
from megascale.precision.dynamic import check_torchao
from megascale.schedule.accumulate import Accumulation, Schedule
from megascale.schedule.layered import Layered
from megascale.schedule.pipeline import Pipeline
from megascale.train.console import Console
from megascale.train.engine import Engine, Native
from megascale.train.in_backward import InBackward
from megascale.train.memory import check_host_room, shape_of
from megascale.train.metrics import RunLog, write_atomic
from megascale.train.observed import Observed
from megascale.train.phases import Phase
from megascale.train.reporter import Reporter
from megascale.train.resume import Start, check_coefficients, claim_run_dir, find_start
from megascale.train.samples import first_facts, micro_batches, note, open_data, resolve_vocabulary
from megascale.train.state import Progress
from megascale.train.stop import StopFlag
from megascale.train.trainer import Trainer
from megascale.train.watch import Pulse, Watch

WATCH_FIRST = 30.0  # seconds
FP8_CAPABILITY = (8, 9)  # from which on CUDA devices multiply FP8: Ada, Hopper and newer
T = TypeVar("T")


def choose_device(config: Config, ranks: RankInfo) -> torch.device:
    wanted = config.run.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("run.device is cuda and torch finds no CUDA device here: use auto or cpu")
    if ranks.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"local rank {ranks.local_rank} has no device of its own: {ranks.local_size} ranks and {torch.cuda.device_count()} devices on "
            "this node; start fewer ranks"
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    capability = torch.cuda.get_device_capability(device)
    if config.precision.fp8 != "false" and capability < FP8_CAPABILITY:
        raise UsageError(
            f"precision.fp8 is {config.precision.fp8} and {torch.cuda.get_device_name(device)} has compute capability {capability}: FP8 "
            f"products need {FP8_CAPABILITY}; use precision.fp8 false, which is the same model in precision.compute"
        )
    return device


@contextmanager
def process_group(config: Config, ranks: RankInfo, device: torch.device) -> Iterator[Watch]:
    """Ranks met (nothing for a process alone) and watched; threads set so that ranks on one node share its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.run.threads or max(1, cores // ranks.local_size))
    limit = config.run.collective_timeout
    if ranks.size == 1:
        yield Watch(ranks, None, limit)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda" and config.parallel.offload:
        backend = "cpu:gloo,cuda:nccl"  # what lies on the host is summed there
    # The watch speaks first, since it knows more; the library's own time-out is for what happens before the watch looks.
    store = open_store(ranks, limit)
    join(store, ranks, backend, limit + WATCH_FIRST)
    try:
        yield Watch(ranks, store, limit)
    finally:
        dist.destroy_process_group()


def leave_together() -> None:
    """Waits for all ranks: launchers that kill what is left when one rank ends must not find anybody still writing."""
    if dist.is_initialized():
        with suppress(RuntimeError):  # a peer that dies now takes nothing with it: the run's state is whole
            dist.barrier()


def agreed(action: Callable[[], T]) -> T:
    """Runs `action` on every rank; an error of one rank is raised on all, so that none waits for another for ever."""
    result, error = None, None
    try:
        result = action()
    except MegascaleError as caught:
        error = caught
    if dist.is_initialized():
        everyone: list[tuple[type[MegascaleError], str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, None if error is None else (type(error), str(error)))
        failed = [(rank, e) for rank, e in enumerate(everyone) if e is not None]
        if failed:
            rank, (kind, text) = failed[0]
            raise kind(text if len(failed) == len(everyone) else f"rank {rank}: {text}") from None
    elif error is not None:
        raise error
    return result  # type: ignore[return-value]


def check_torch(config: Config) -> None:
    """Refuses what the installed torch cannot do: before 2.12 the stages of its pipelines were of another make."""
    if config.precision.fp8 == "dynamic":
        check_torchao()
    if config.parallel.pp > 1 and torch.__version__.startswith("2.11."):
        raise UsageError(f"parallel.pp is {config.parallel.pp} and torch is {torch.__version__}: pipelines need torch 2.12, or set pp to 1")


def check_offload_dir(config: Config) -> None:
    """Raises UsageError where the folder for offloaded state is not there, on any node."""
    folder = config.parallel.offload_dir
    if folder is not None and not Path(folder).is_dir():
        raise UsageError(f"parallel.offload_dir is {folder}, and {node_name()} has no such folder: make it, on every node")


def build_model(config: Config, mesh: Mesh, device: torch.device) -> tuple[ParallelModel, dict[str, Any], float]:
    """The cut model in memory, facts for the log, and its training FLOPs per token."""
    kernels = choose_kernels(config.run.kernels, config.model.norm, device)
    shape = shape_of(config)
    specs = specs_of(build_part(config.model, shape, kernels.norm))
    for key in config.optim.multipliers:
        if not any(key in (name, any_layer(name)) for name in specs):
            near = difflib.get_close_matches(key, [*specs, *{any_layer(n) for n in specs}], 1)
            raise UsageError(f"optim.multipliers names {key}, which no weight is called{f'; did you mean {near[0]}?' if near else ''}")
    flops = flops_per_token(config.model, specs, config.train.seq_len, config.train.source_length)
    active = active_parameters(specs)
    facts = {
        "parameters": sum(s.numel for s in specs.values()),
        "parameters_active": active,
        "norm_kernel": f"{kernels.source} ({kernels.reason})",
        **({"threads": torch.get_num_threads()} if device.type == "cpu" else {}),
    }
    stages = build_stages(config.model, shape, kernels.norm, config.parallel, mesh["pp"].rank)
    return parallelize(stages, mesh, config.parallel, device, products_of(config.precision)), facts, flops


def products_of(precision: Precision) -> Fp8:
    """How hidden products are computed."""
    return precision.fp8_recipe if precision.fp8 == "dynamic" else precision.fp8


def build_schedule(model: ParallelModel, parallel: Parallel, device: torch.device) -> Schedule:
    if parallel.pp > 1:
        return Pipeline(model, parallel, device)
    return Layered(model, parallel.breadth_first) if parallel.accumulation == "layered" else Accumulation(model)


def build_engine(model: ParallelModel, config: Config, device: torch.device) -> Engine:
    if config.parallel.engine == "deepspeed":
        from megascale.train.deepspeed import DeepSpeed  # an extra, imported for those who ask for it

        return DeepSpeed(model, config, device)
    schedule = build_schedule(model, config.parallel, device)
    if config.parallel.update_in_backward:
        assert isinstance(schedule, Layered)
        return InBackward(model, schedule, config.optim, device)
    optimizer = build_optimizer(model, config.optim, config.parallel.offload)
    return Native(model, schedule, optimizer, config.train.clip, factors=norm_factors(model.weights, config.optim))


@contextmanager
def build_trainer(
    config: Config, ranks: RankInfo, stop: StopFlag | None = None, pulse: Pulse | None = None, phase: Phase | None = None
) -> Iterator[Trainer]:
    """Everything between a config and the first step. Nothing is written before all ranks agree that the run can start.

    stop   what signals set, where somebody listens to them already
    pulse  where the trainer says what it does, for a watch
    phase  which part of a run that grows this is; the whole of it if absent
    """
    whole = config if phase is None else phase.whole
    config = check(agreed(lambda: resolve_vocabulary(config)), ranks.size)
    if config.checkpoint.init_schedule == "lemon":
        config = config.model_copy(update={"optim": begun_again(config.optim, config.train.total_steps)})
    if phase is None:
        whole = config
    until = config.train.total_steps if phase is None else phase.until
    agreed(lambda: check_torch(config))
    device = agreed(lambda: choose_device(config, ranks))
    agreed(lambda: check_offload_dir(config))
    agreed(lambda: check_host_room(config, ranks))
    run_dir = Path(config.run_dir)
    first = ranks.rank == 0
    start: Start = agreed(lambda: find_start(config, run_dir, whole, None if phase is None else phase.origin))
    mixture, valid_sets = agreed(lambda: open_data(config))
    mesh = build_mesh(axis_sizes(config.parallel, ranks.size), device.type, config.parallel.heads_over)
    model, facts, flops = agreed(lambda: build_model(config, mesh, device))
    for _ in model.draw_weights(config.run.seed):
        pass
    engine = build_engine(model, config, device)
    progress = Progress()
    if start.folder is not None:
        state = engine.pieces()
        if start.weights_only:
            state = {name: piece for name, piece in state.items() if name.startswith("model.")}
        if start.foreign is not None:
            produce = start.foreign.produce
            agreed(lambda: fill(state, produce))
        else:
            saved = load(start.folder, state, prefix="model." if start.weights_only else None)
        engine.loaded(state)
        progress = Progress(samples=start.samples)
        if not start.weights_only:
            progress = Progress(**{k: saved[k] for k in Progress().plain()})
        agreed(lambda: check_coefficients(config, model, start.folder))
    agreed(lambda: claim_run_dir(config, run_dir, start) if first else None)
    log, console = None, None
    if first:
        log = RunLog(run_dir, progress.step)
        console = Console(config.train.total_steps, progress.step)
        announce(config, ranks, facts, start, progress, note(mixture), log, console)
        write_atomic(run_dir / "config.yaml", to_yaml(whole.plain()))
    peak = config.run.peak_tflops * 1e12 if config.run.peak_tflops else peak_flops(device, model.model.shape.compute)
    reporter = Reporter(
        mesh,
        device,
        config.train,
        config.train.total_steps,
        flops,
        peak,
        Observed(model),
        log,
        console,
        {
            "identity": identity(config),
            "config": config.plain(),
            "layout": describe(config.parallel),
            "torch": torch.__version__,
        },
        config.run.profile_step,
        str(run_dir / f"trace-rank{ranks.rank}.json"),
        f"{start.folder}" if start.folder is not None else "none",
    )
    if log is not None and config.run.tensorboard:
        log.add_tensorboard(progress.step)
    if config.run.wandb:
        known = progress.logger_ids.get("wandb", "")
        progress.logger_ids["wandb"] = agreed(lambda: log.add_wandb(config.run.name, config.plain(), known or None) if log else known)
    batch = config.train.global_batch_size
    origin = progress.samples - progress.step * batch
    batches = Prefetcher(
        lambda step: micro_batches(config, mixture, origin + (step - 1) * batch, mesh, device),
        progress.step + 1,
        until,
    )
    valid = {
        name: [micro_batches(config, m, i * batch, mesh, device) for i in range(config.train.eval_steps)] for name, m in valid_sets.items()
    }
    keep = config.checkpoint
    checkpointer = Checkpointer(
        run_dir / "checkpoints",
        keep_last=keep.keep_last,
        keep_every=keep.keep_every,
        asynchronous=keep.asynchronous,
        export=partial(export_beside, dtype=model.model.shape.compute) if keep.export == "hf" else None,
    )
    pulse = pulse or Pulse()
    pulse.traffic = mesh.traffic
    stop = stop or StopFlag()
    stop.file = run_dir / "STOP" if first else None
    trainer = Trainer(config, model, engine, batches, valid, checkpointer, reporter, stop, pulse, progress, device, until)
    try:
        yield trainer
    finally:
        batches.close()
        reporter.checkpoints(checkpointer.finish(), progress.step)
        if console is not None:
            console.close()
        if log is not None:
            log.close()


def announce(
    config: Config,
    ranks: RankInfo,
    facts: dict[str, Any],
    start: Start,
    progress: Progress,
    data_note: str | None,
    log: RunLog,
    console: Console,
) -> None:
    """What starts here, for the reader of the screen and of events.jsonl."""
    layout = describe(config.parallel)
    entropy = first_facts(config).get("unigram_entropy")
    details: dict[str, Any] = {
        "layout": layout,
        "ranks": ranks.size,
        **facts,
        "torch": torch.__version__,
        "node": node_name(),
        "unigram_entropy": entropy,
        "began": round(psutil.Process().create_time(), 3),
        **log.past,
    }
    if start.folder is not None:
        details["from"] = str(start.folder)
    log.event("resume" if progress.step else "start", progress.step, **details)
    if start.changes:
        log.event("change", progress.step, changes={k: list(v) for k, v in start.changes.items()})
    size, active = facts["parameters"], facts["parameters_active"]
    many = f"{size / 1e6:.1f}M parameters" + (f", {active / 1e6:.1f}M of them a token," if active < size else "")
    fp8 = "" if config.precision.fp8 == "false" else f" with products in FP8 ({config.precision.fp8} scales)"
    threads = f", {facts['threads']} threads a process" if "threads" in facts else ""
    console.say(f"{config.run.name}: {many} on {layout}, {config.precision.compute}{fp8}{threads}, norm kernel {facts['norm_kernel']}")
    if entropy is not None:
        console.say(f"unigram entropy of the tokens: {entropy:.4f} nats; a model that only counts tokens stops there")
    if start.folder is not None:
        console.say(f"{'weights' if start.weights_only else 'everything'} from {start.folder}; next is step {progress.step + 1}")
    for sentence in (padding_note(config), data_note):
        if sentence:
            console.warn(sentence)
