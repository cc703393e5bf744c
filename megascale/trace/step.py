"""The real training step as one rank, on whatever device: fake memory, or real memory that the same meter measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megascale.checkpoint.saver import NoCheckpoints
from megascale.config.schema import Config
from megascale.data.loader import Batch
from megascale.evaluation.in_run import Evaluations
from megascale.parallel.model import ParallelModel
from megascale.trace.meter import Meter
from megascale.train.build import build_engine
from megascale.train.engines.engine import Engine
from megascale.train.faults.stop import StopFlag
from megascale.train.faults.watchdog import Activity
from megascale.train.phases import Phase
from megascale.train.state import Progress
from megascale.train.trainer import Trainer

Integers = Callable[[tuple[int, ...], int], Tensor]  # (shape, vocabulary) → integers on the device


class StepWatch:
    """What a meter needs to know about a step: which phase begins, and what turned out to be a gradient."""

    def phase(self, name: str) -> None: ...

    def gradients(self, tensors: list[Tensor]) -> None: ...


def batch_of(config: Config, device: torch.device, integers: Integers) -> Batch:
    """A micro-batch in which every target counts, shaped as the data would be."""
    model, train = config.model, config.train
    rows = train.micro_batch_size
    samples = integers((rows,), 1)
    if model.spacetime is not None:
        f = model.spacetime
        fields = torch.zeros((rows, f.frames, *f.shape[1:], f.channels), device=device)
        text = integers((rows, f.text_len), f.text_vocab_size or 1) if f.text_len else None
        return Batch(fields, integers((rows, f.tokens), 1), None, None, samples, rows * f.tokens, text)
    assert model.vocab_size is not None
    shape = rows, train.seq_len
    tokens, targets = integers(shape, model.vocab_size), integers(shape, model.vocab_size)
    source = documents = positions = None
    if model.encoder_layers:
        source = integers((rows, train.source_length), model.source_vocab_size or model.vocab_size)
    elif train.packing == "documents":
        documents, positions = integers(shape, 1), integers(shape, 1)
    return Batch(tokens, targets, documents, positions, samples, rows * train.seq_len, source)


def trainer_of(
    config: Config,
    model: ParallelModel,
    engine: Engine,
    device: torch.device,
    batches: Any = (),
    reporter: Any = None,
    until: int = 1,
) -> Trainer:
    """A trainer without files and threads; without `batches` and a `reporter` for `train_step` alone."""
    metrics = [m for stage in model.stages for m in _metrics(stage)]
    silent: Any = SimpleNamespace(observed=SimpleNamespace(flush=lambda: [m.flush() for m in metrics]), last_good="none")
    return Trainer(
        config=config,
        model=model,
        engine=engine,
        batches=batches,
        valid={},
        checkpointer=NoCheckpoints(),
        reporter=silent if reporter is None else reporter,
        stop=StopFlag(),
        activity=Activity(),
        progress=Progress(),
        device=device,
        phase=Phase(config, config, until),
        evaluations=Evaluations(config, (), model, device),
    )


def _metrics(stage: torch.nn.Module) -> Iterator[Any]:
    from megascale.model.module_metrics import ModuleMetrics

    for module in stage.modules():
        found = getattr(module, "metrics", None)
        if isinstance(found, ModuleMetrics):
            yield found


def watched(engine: Engine, watch: StepWatch) -> Engine:
    """`engine`, whose halves tell `watch` when they begin."""
    run, update = engine.run, engine.update

    def watched_run(*args: Any, **kwargs: Any) -> Tensor:
        watch.phase("forward")
        return run(*args, **kwargs)

    def watched_update(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        watch.gradients([g for w in engine.model.weights if (g := w.local_grad) is not None])
        watch.phase("update")
        return update(*args, **kwargs)

    engine.run, engine.update = watched_run, watched_update  # type: ignore[method-assign]
    return engine


@contextmanager
def backward_told(watch: StepWatch) -> Iterator[None]:
    """Inside, `watch` hears when a backward pass begins and ends, and which gradients FSDP2 reduces or adds up."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

    backward: Any = torch.autograd.backward
    reduce: Any = getattr(_fsdp_param_group, "foreach_reduce", None)
    added: Any = getattr(_fsdp_param.FSDPParam, "to_accumulated_grad_if_needed", None)

    def told(*args: Any, **kwargs: Any) -> Any:
        watch.phase("backward")
        try:
            return backward(*args, **kwargs)
        finally:
            watch.phase("forward")

    def told_reduce(parameters: Any, gradients: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        watch.gradients(gradients)
        return reduce(parameters, gradients, *args, **kwargs)

    def told_added(parameter: Any) -> None:
        added(parameter)
        if parameter.unsharded_accumulated_grad is not None:
            watch.gradients([parameter.unsharded_accumulated_grad])

    changes: list[tuple[Any, str, Any, Any]] = [(torch.autograd, "backward", backward, told)]
    changes += [(_fsdp_param_group, "foreach_reduce", reduce, told_reduce)] if reduce is not None else []
    changes += [(_fsdp_param.FSDPParam, "to_accumulated_grad_if_needed", added, told_added)] if added is not None else []
    for owner, name, _, function in changes:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, before, _ in changes:
            setattr(owner, name, before)


@contextmanager
def actions_timed(now: Callable[[], float]) -> Iterator[dict[str, dict[str, float]]]:
    """Inside, the model time of each kind of action of a pipeline's stages: "kind stage" → how often, and seconds in all. Empty if torch's
    stages have other methods.
    """
    from megascale.schedule.pipeline import Stage

    found: dict[str, dict[str, float]] = {}
    names = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")
    known = {name: (getattr(Stage, name), name in vars(Stage)) for name in names if hasattr(Stage, name)}

    def timed(name: str, function: Any) -> Any:
        def run(stage: Any, *args: Any, **kwargs: Any) -> Any:
            kind = "F" if name == "forward_one_chunk" else "W" if "weight" in name else "B" if kwargs.get("full_backward", True) else "I"
            begun = now()
            result = function(stage, *args, **kwargs)
            row = found.setdefault(f"{kind} {stage.stage_index}", {"times": 0, "seconds": 0.0})
            row["times"], row["seconds"] = row["times"] + 1, row["seconds"] + now() - begun
            return result

        return run

    for name, (function, _) in known.items():
        setattr(Stage, name, timed(name, function))
    try:
        yield found
    finally:
        for name, (function, own) in known.items():
            setattr(Stage, name, function) if own else delattr(Stage, name)


def run_steps(
    config: Config,
    model: ParallelModel,
    device: torch.device,
    integers: Integers,
    micro_batches: int,
    steps: int,
    meter: Meter,
    begin: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Builds the engine and makes `steps` steps under `meter`; `begin` is called before the last. Returns what it sent, by
    axis.
    """
    watch = _MeterWatch(meter)
    with meter, backward_told(watch):
        meter.own([w.local for w in model.weights], "weights")
        if model.tied_copy is not None:
            meter.own([model.tied_copy.local], "weights")
        meter.own([s.tensor for s in model.states], "weights")
        meter.kind = "optimizer"
        engine = watched(build_engine(model, config, device), watch)
        meter.kind = "batch"
        batches = [batch_of(config, device, integers) for _ in range(micro_batches)]
        meter.kind = "activations"
        trainer = trainer_of(config, model, engine, device)
        for step in range(1, steps + 1):
            meter.clear()
            if step == steps:
                begin()
            result = trainer.train_step(step, batches)
    return result.sent


class _MeterWatch(StepWatch):
    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def phase(self, name: str) -> None:
        self.meter.memory.phase = name
        self.meter.kind = "temporaries" if name == "update" else "activations"

    def gradients(self, tensors: list[Tensor]) -> None:
        for x in tensors:
            self.meter.memory.relabel(x, "gradients")
