"""Metrics of a step, one row each: a name in metrics.jsonl and a function of what rank 0 knows about a logged step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megascale.config.schema import Train
from megascale.errors import UsageError
from megascale.plugins import giver_of, resolve, with_plugins
from megascale.rows import GROUPS


@dataclass(frozen=True)
class LoggedStep:
    """What the host knows about a step and about the steps since the last logged one.

    loss, grad_norm  NaN if not finite
    steps, seconds   since the last row: number of steps, and seconds without evaluation and saving
    waited           seconds of waiting for data in that time; `sent`: bytes per axis in this step; the largest over all ranks
    flops_per_token  FLOPs per token of training
    peak             FLOP/s of one rank, if known
    valid_loss       per validation set, if the step ends with an evaluation; `evaluate`: the results of evaluations by their names
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    step_seconds: float
    steps: int
    seconds: float
    waited: float
    sent: Mapping[str, int]
    memory_bytes: int
    ranks: int
    cfg: Train
    flops_per_token: float
    peak: float | None = None
    valid_loss: Mapping[str, float] | None = None
    valid_seconds: float = 0.0
    evaluate: Mapping[str, Mapping[str, float]] | None = None

    @property
    def evaluated(self) -> bool:
        return self.valid_loss is not None or self.evaluate is not None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second since the last row."""
        return self.steps * self.cfg.global_batch_size * self.cfg.seq_len / max(self.seconds, 1e-9)

    @property
    def mfu(self) -> float | None:
        return None if self.peak is None else self.tokens_per_second * self.flops_per_token / (self.peak * self.ranks)


ReadMetric = Callable[[LoggedStep], Any]


@dataclass(frozen=True)
class StepMetric:
    """`read` may be "module:function". `evaluated`: only steps with an evaluation have it."""

    read: str | ReadMetric
    evaluated: bool = False


STEP_METRICS: dict[str, StepMetric] = {
    "step": StepMetric(lambda s: s.step),
    "time": StepMetric(lambda s: round(time.time(), 3)),
    "loss": StepMetric(lambda s: s.loss),
    "grad_norm": StepMetric(lambda s: s.grad_norm),
    "lr": StepMetric(lambda s: s.lr),
    "tokens": StepMetric(lambda s: s.tokens),
    "tokens_per_second": StepMetric(lambda s: s.tokens_per_second),
    "step_seconds": StepMetric(lambda s: s.step_seconds),
    "data_seconds": StepMetric(lambda s: s.waited / s.steps),
    "mfu": StepMetric(lambda s: s.mfu),
    "memory_bytes": StepMetric(lambda s: s.memory_bytes),
    "sent_bytes": StepMetric(lambda s: dict(s.sent)),
    "valid_loss": StepMetric(lambda s: s.valid_loss, evaluated=True),
    "evaluate": StepMetric(lambda s: s.evaluate, evaluated=True),
    "valid_seconds": StepMetric(lambda s: s.valid_seconds, evaluated=True),
}


def step_metrics() -> dict[str, StepMetric]:
    """Metrics by name, in the order of a row's keys. Raises UsageError for one that cannot be imported or is reserved."""
    found = with_plugins("metrics", STEP_METRICS, StepMetric)
    for name in GROUPS:
        if name in found:
            raise UsageError(
                f"the plugin {giver_of('metrics', name)} has {name} among its metrics, and what modules tell of a step stands in its row "
                "under that name: give the metric another name"
            )
    return {name: StepMetric(resolve(m.read, f"the metric {name}"), m.evaluated) for name, m in found.items()}


def metrics_of(step: LoggedStep, metrics: Mapping[str, StepMetric]) -> tuple[dict[str, Any], dict[str, str]]:
    """A step's row, and {name: error} for plugin metrics that failed: they are null, since a log never ends a run."""
    row: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name, metric in metrics.items():
        if metric.evaluated and not step.evaluated:
            continue
        assert not isinstance(metric.read, str)  # step_metrics
        if name in STEP_METRICS:
            if (value := metric.read(step)) is not None or not metric.evaluated:
                row[name] = value
            continue
        try:
            value = metric.read(step)
            row[name] = None if value is None else float(value)
        except Exception as error:
            row[name], wrong[name] = None, f"{type(error).__name__}: {error}"
    return row, wrong
