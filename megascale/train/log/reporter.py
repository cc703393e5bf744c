"""Turns step results on the device into rows, events and a live line; reads a result only once the device has it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from megascale.checkpoint.saver import Event
from megascale.comm.host import HostCopy, to_device
from megascale.comm.mesh import Mesh
from megascale.config.schema import Train
from megascale.errors import PeerLostError
from megascale.model.module_metrics import Totals
from megascale.precision.watch import warnings as cast_warnings
from megascale.train.log.console import Console
from megascale.train.log.module_metrics import MetricSource, MetricsOverRanks
from megascale.train.log.run_log import RunLog
from megascale.train.log.step_metrics import LoggedStep, StepMetric, metrics_of
from megascale.train.state import Progress


@dataclass
class StepResult:
    """One step's numbers, on the device until the host knows them. Reading `loss` or `grad_norm` waits for them.

    numbers  [5], fp64: loss, gradient norm, whether the weights changed, targets in the batch times a constant, ranks that ask to stop
    told     `numbers` on their way to the host; on a `logged` step followed by the values of a row, reduced over all ranks
    """

    step: int
    numbers: Tensor
    lr: float
    clock: StepClock
    sent: dict[str, int]  # bytes that this rank sent, by axis
    seen: dict[MetricSource, Totals]  # metrics of local modules
    sampled: bool = False  # includes modules that measure on sampled steps only
    valid_loss: dict[str, float] | None = None
    evaluate: dict[str, dict[str, float]] | None = None  # results by the evaluation's name
    valid_seconds: float = 0.0
    waited: float = 0.0  # seconds this rank waited for the batch
    stalled: float = 0.0  # seconds of evaluation and saving since the previous step
    tokens: int = 0
    told: HostCopy | None = None
    logged: bool = False

    @property
    def evaluated(self) -> bool:
        return self.valid_loss is not None or self.evaluate is not None

    @property
    def number(self) -> int:
        """Number of the step in the run, from 1."""
        return self.step

    @property
    def loss(self) -> float:
        """Cross-entropy per valid token over the global batch, before the update."""
        return float(self.known[0])

    @property
    def grad_norm(self) -> float:
        """Norm of the whole gradient, before clipping."""
        return float(self.known[1])

    @property
    def known(self) -> Tensor:
        """`numbers` and what follows them, on the host."""
        if self.told is None:
            self.told = HostCopy(self.numbers)
        return self.told.read()


class StepClock:
    """Seconds of a step, measured on the device if the host runs ahead of it."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[Any] = []
        if device.type != "cpu":
            self._events = [torch.get_device_module(device).Event(enable_timing=True) for _ in range(2)]
        if self._events:
            self._events[0].record()
        self._start = self._end = time.perf_counter()

    def stop(self) -> StepClock:
        if self._events:
            self._events[1].record()
        self._end = time.perf_counter()
        return self

    def seconds(self) -> float:
        if self._events:
            return float(self._events[0].elapsed_time(self._events[1])) / 1000
        return self._end - self._start

    def after(self, before: StepClock) -> float:
        """Seconds from the end of an earlier step to the end of this one."""
        if self._events:
            return float(before._events[1].elapsed_time(self._events[1])) / 1000
        return self._end - before._end


@dataclass
class Since:
    """Steps and seconds since the last row: a row covers all steps since the previous one."""

    steps: int = 0
    seconds: float = 0.0  # from step to step, without evaluation and saving

    def add(self, result: StepResult, before: StepClock | None) -> None:
        own = result.clock.seconds()
        self.steps += 1
        self.seconds += own + result.waited if before is None else max(own, result.clock.after(before) - result.stalled)


@dataclass(kw_only=True)
class Reporter:
    """`log` and `console` are None on every rank but the first.

    On a device, results are copied to the host as soon as their step is queued (on logged steps reduced over ranks), and read one step
    later, when the next is queued: the device never waits for the host, nor the host for the current step.
    """

    mesh: Mesh
    device: torch.device
    cfg: Train
    last_step: int
    flops_per_token: float
    peak: float | None  # FLOP/s of one rank
    observed: MetricsOverRanks
    log: RunLog | None
    console: Console | None
    provenance: dict[str, Any]  # recorded in every checkpoint with the progress
    metrics: Mapping[str, StepMetric]  # columns of a row, by name
    profile_step: int | None = None
    profile_path: str = ""
    last_good: str = "none"
    _waiting: deque[tuple[StepResult, Progress]] = field(default_factory=deque)
    _stop: bool = False
    _before: StepClock | None = None  # of the previous step of this attempt
    _since: Since = field(default_factory=Since)
    _waited: float = 0.0  # seconds for batches since the last logged step

    def step(self, result: StepResult, progress: Progress) -> None:
        result.tokens = progress.tokens
        result.logged = result.step % self.cfg.log_every == 0 or result.step in (1, self.last_step) or result.evaluated
        self._waited += result.waited
        result.told = HostCopy(self._over_ranks(result) if result.logged else result.numbers)
        self._waiting.append((result, progress))
        lag = 1 if self.device.type != "cpu" and result.step < self.last_step and not result.evaluated else 0
        while len(self._waiting) > lag:
            self._read(*self._waiting.popleft())

    def flush(self) -> None:
        """Reads the remaining results, on all ranks alike."""
        while self._waiting:
            self._read(*self._waiting.popleft())

    def stop_agreed(self) -> bool:
        """True on all ranks alike once any rank's request is in a result that has been read."""
        return self._stop

    def event(self, event: str, step: int, **details: Any) -> None:
        if self.log is not None:
            self.log.event(event, step, **details)

    def warn_once(self, what: str, sentence: str) -> None:
        if self.log is not None:
            self.log.warn_once(what, sentence)

    def phase(self, step: int, changes: Mapping[str, Any]) -> None:
        """Reports that a phase begins after `step`, with its changes {section.key: value}."""
        self.event("phase", step, changes=dict(changes))
        if self.console is not None:
            self.console.say(f"phase from step {step + 1} on: {', '.join(f'{key} {value}' for key, value in changes.items())}")

    def frozen(self, step: int, seconds: float) -> None:
        """Reports that the process, and usually the whole job, was suspended for a while."""
        self.event("frozen", step, seconds=round(seconds, 1))
        if self.console is not None:
            self.console.warn(f"this job was frozen for {seconds:.0f} s (the job or its machine was suspended); training continues")

    def checkpoints(self, events: list[Event], step: int) -> None:
        for e in events:
            if e.kind == "saved":
                self.last_good = f"step {e.step}"
            if self.log is not None:
                kind = "save_failed" if e.kind == "failed" else e.kind
                self.log.event(kind, e.step, seconds=round(e.seconds, 3), message=e.message)
            if self.console is not None and e.kind in ("failed", "export_failed") and e.code != PeerLostError.code:  # that ends the run
                what = "the checkpoint" if e.kind == "failed" else "the export"
                self.console.warn(f"{what} of step {e.step} was not written; training continues: {e.message}")

    @contextmanager
    def profile(self, step: int) -> Iterator[None]:
        """A profiler trace of one step, for chrome://tracing or Perfetto, when `run.profile_step` asks for it."""
        if step != self.profile_step:
            yield
            return
        with torch.profiler.profile(record_shapes=True, profile_memory=True) as profiler:
            yield
        try:
            profiler.export_chrome_trace(self.profile_path)
        except (OSError, RuntimeError) as error:
            self.warn_once("trace", f"the trace {self.profile_path} was not written; training continues: {error}")

    def _read(self, result: StepResult, progress: Progress) -> None:
        self._judge(result, progress)
        self._since.add(result, self._before)
        self._before = result.clock
        if not result.logged:
            return
        since, self._since = self._since, Since()
        if self.log is None or self.console is None:
            return
        sent, waited, seen = self._of_all(result)
        step = LoggedStep(
            result.step,
            result.loss,
            result.grad_norm,
            result.lr,
            result.tokens,
            result.clock.seconds(),
            since.steps,
            since.seconds,
            waited,
            sent,
            memory_bytes(self.device),
            self.mesh.size,
            self.cfg,
            self.flops_per_token,
            self.peak,
            result.valid_loss,
            result.valid_seconds,
            result.evaluate,
        )
        own, wrong = metrics_of(step, self.metrics)
        row = {**{k: v for k, v in own.items() if not self.metrics[k].evaluated}, **seen, **own}
        for name, why in wrong.items():
            self.warn_once(f"metric {name}", f"the metric {name} is null from step {step.step} on; training continues: {why}")
        self.log.metrics(row)
        self.console.step(row)
        for kind, sentence in (cast_warnings(seen["fp8"]) if "fp8" in seen else {}).items():
            if self.log.warn_once(kind, sentence):
                self.log.event("fp8_warning", result.step, message=sentence)

    def _judge(self, result: StepResult, progress: Progress) -> None:
        """Records requests to stop and skipped steps. A step without targets is not skipped: it changes nothing, and its loss is null."""
        loss, norm, moved, valid, stop = result.known[: len(result.numbers)].tolist()
        self._stop = self._stop or stop > 0
        if valid == 0:
            self.event("empty_step", result.step)
            self.warn_once(
                "empty step",
                f"no token of step {result.step} is a target (data.packing, or what a sample masks, leaves none): its loss is null and "
                "nothing is updated; events.jsonl has an empty_step for every such step",
            )
            return
        spike = not moved and math.isfinite(loss) and math.isfinite(norm)
        progress.skipped_in_a_row = 0 if moved or spike else progress.skipped_in_a_row + 1
        if not moved:
            self.event("skip", result.step, loss=result.loss, grad_norm=result.grad_norm, **({"why": "spike"} if spike else {}))

    def _over_ranks(self, result: StepResult) -> Tensor:
        """A step's numbers, then maxima over all ranks (bytes sent by axis, nanoseconds of waiting for data since the last row, maxima of
        modules), then sums. Collective: one message for maxima, one for sums, and one vector for the host.
        """
        maxima, sums = self.observed.vectors(result.seen, self.device, result.sampled)
        here = [*(result.sent.get(a, 0) for a in self._axes), round(self._waited * 1e9)]
        self._waited = 0.0
        maxima = torch.cat([to_device(here, self.device), maxima])
        if self.mesh.size > 1:
            dist.all_reduce(maxima, dist.ReduceOp.MAX)
            dist.all_reduce(sums)
        return torch.cat([result.numbers, maxima, sums])

    def _of_all(self, result: StepResult) -> tuple[dict[str, int], float, dict[str, dict[str, list[Any]]]]:
        """Reads the result of `_over_ranks`: bytes by axis, seconds of waiting, and the modules' metrics as a row."""
        axes, behind = self._axes, result.known[len(result.numbers) :]
        *sent, waited = behind[: len(axes) + 1].tolist()
        by_axis = {axis: int(n) for axis, n in zip(axes, sent) if n or self.mesh[axis].size > 1}
        return by_axis, waited / 1e9, self.observed.row(behind[len(axes) + 1 :], result.sampled)

    @property
    def _axes(self) -> list[str]:
        return list(dict.fromkeys(axis.name for axis in self.mesh.axes.values() if axis.size > 1))


def memory_bytes(device: torch.device) -> int:
    """Memory of this rank: peak allocated on CUDA, currently resident on CPUs."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
