"""A rule of the support table, and questions that several files of rules ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megascale.config.schema import Config, Model


@dataclass(frozen=True)
class Rule:
    """`keys` disagree when `applies(config, ranks)`; `why` and `fix` complete the sentence. `later`: planned. `whole`: it asks about the
    whole model; other rules must hold for each kind of layer by itself.
    """

    name: str
    keys: tuple[str, ...]
    applies: Callable[[Config, int], bool]
    why: str
    fix: str
    later: bool = False
    whole: bool = False


def grid(config: Config) -> bool:
    return config.model.family == "spacetime" and config.model.spacetime is not None


def changed(model: Model, *keys: str) -> bool:
    """Whether one of the keys is not as it is by default."""
    return any(getattr(model, key) != Model.model_fields[key].default for key in keys)


def pair(config: Config) -> bool:
    return config.model.family == "encoder_decoder"


def own_expert_axes(config: Config) -> bool:
    return config.parallel.ep > 1 or config.parallel.expert_tp != config.parallel.tp
