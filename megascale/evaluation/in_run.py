"""The evaluations of a run: opened before its first step, run at steps with the run's own engine and layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megascale.config.schema import Config, EvaluateAt
from megascale.data.tokenizer import Tokenizer, beside, load_tokenizer
from megascale.data.vocabulary import first_prefix
from megascale.errors import UsageError
from megascale.evaluation.score import Scorer
from megascale.evaluation.tasks import Results, Task, open_task, run_task
from megascale.parallel.model import ParallelModel
from megascale.train.engines.engine import Engine


def open_evaluations(config: Config) -> list[Task]:
    """Reads and tokenizes the files of `evaluate`. Raises UsageError."""
    if not config.evaluate:
        return []
    assert config.model.vocab_size is not None
    tokenizer, length, known = _tokenizer(config), config.train.seq_len, config.model.vocab_enabled or config.model.vocab_size
    return [open_task(e.name, e.kind, Path(e.path), tokenizer, length, known) for e in config.evaluate]


def _tokenizer(config: Config) -> Tokenizer:
    prefix = first_prefix(config)
    path = config.data.tokenizer or beside(prefix)
    if path is None:
        raise UsageError(f"evaluate needs a tokenizer, and there is none next to {prefix}: set data.tokenizer")
    return load_tokenizer(path, prefix)


@dataclass(frozen=True)
class Evaluations:
    """The tasks of a config's `evaluate`, in its order."""

    config: Config
    tasks: Sequence[Task]
    model: ParallelModel
    device: torch.device

    def due(self, step: int) -> list[Task]:
        """Those to run after `step`; all of them when the run ends."""
        last = step == self.config.train.total_steps
        return [task for entry, task in zip(self.config.evaluate, self.tasks) if last or self._at(entry, step)]

    def _at(self, entry: EvaluateAt, step: int) -> bool:
        every = self.config.train.eval_every if entry.every is None else entry.every
        return every > 0 and step % every == 0

    def run(self, tasks: Sequence[Task], engine: Engine) -> dict[str, Results]:
        """Results by name. Collective. Raises Halted if the run is asked to stop."""
        train = self.config.train
        scorer = Scorer(
            self.model, engine.evaluate, self.device, train.seq_len, train.global_batch_size, train.micro_batch_size, packed=True
        )
        return {task.name: run_task(task, scorer) for task in tasks}
