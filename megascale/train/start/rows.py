"""Checks that everything that a run's rows name can be imported, before anything is built or written."""

from __future__ import annotations

from megascale.config.optimizers import optimizers
from megascale.config.schema import Config
from megascale.model.activations import activation
from megascale.model.norms import norm
from megascale.plugins import resolve
from megascale.train.log.step_metrics import step_metrics


def check_rows(config: Config) -> None:
    """Raises UsageError naming the plugin's row and the missing import."""
    resolve(optimizers()[config.optim.name].build, f"the optimizer {config.optim.name}")
    norm(config.model.norm)
    activation(config.model.ffn)
    step_metrics()
