"""The phases of a run as plain data: which config holds from which step on, and where its samples, tokens and schedule begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megascale.config.load import build_config
from megascale.config.schema import Config, PhaseAt
from megascale.errors import UsageError

SECTIONS = ("model", "parallel", "train", "optim", "data", "checkpoint", "precision")
# A run has one of each from its first step to its last.
FIXED = {
    "train.steps": "the length is that of the whole run",
    "train.tokens": "the length is that of the whole run",
    "optim.name": "another optimizer keeps another state",
    "optim.moments": "the optimizer's state keeps its number format",
    "optim.schedule_by": "the whole run counts its schedule in one unit",
    "data.order": "the order of samples is that of the whole run",
    "data.chunk": "pieces of data are cut once",
    "data.valid_fraction": "documents that are held out stay held out",
    "data.objective": "samples keep their form",
    "data.tokenizer": "the vocabulary is that of the whole run",
    "data.source_tokenizer": "the vocabulary is that of the whole run",
    "checkpoint.resume": "it says where the run starts",
    "checkpoint.init_from": "it says where the run starts",
    "checkpoint.init_ema": "it says where the run starts",
    "checkpoint.init_schedule": "it says where the run starts",
    "checkpoint.init_data": "it says where the run starts",
    "parallel.engine": "engines keep their state in different forms",
}
# A phase that sets one of them begins a new schedule; `lr` and `min_lr_ratio` alone only scale the present one.
SCHEDULE = ("optim.decay", "optim.decay_steps", "optim.warmup_steps")


@dataclass(frozen=True)
class Clock:
    """Where a step is in its learning-rate schedule, in steps of the batch with which the schedule began.

    first   the phase's first step
    before  how much of the schedule is over before it
    each    how much a step of the phase adds
    total   length of the schedule
    """

    first: int
    before: float
    each: float
    total: float

    def at(self, step: int) -> float:
        """The position of a step, 1 for the schedule's first."""
        return self.before + (step - self.first + 1) * self.each


@dataclass(frozen=True)
class Span:
    """Steps `first` to `last` of a run with one `config`, after `samples` samples and `tokens` tokens. `entry`: its place in `phases`, from
    0; None for the beginning.
    """

    config: Config
    first: int
    last: int
    samples: int
    tokens: int
    clock: Clock
    entry: int | None = None


def plain_clock(config: Config) -> Clock:
    """The clock of a run with one schedule and one batch, in whole steps."""
    return Clock(1, 0, 1, config.train.total_steps)


def spans_of(config: Config) -> list[Span]:
    """All phases in order; one for a run without `phases`. Raises UsageError for phases that do not follow each other."""
    if not config.phases:
        return [Span(config, 1, config.train.total_steps, 0, 0, plain_clock(config))]
    configs = _configs(config)
    firsts, samples, tokens = [1], [0], [0]
    for number, entry in enumerate(config.phases):
        batch, places = _per_step(configs[number])
        if entry.steps is not None:
            first = entry.steps + 1
        else:
            assert entry.tokens is not None
            first = firsts[-1] + -(-(entry.tokens - tokens[-1]) // places)
        steps = first - firsts[-1]
        if steps < 1:
            raise UsageError(
                f"phases[{number}] begins at {told(entry)}, which is step {first}, but the phase before it begins at step {firsts[-1]}: "
                "give each phase a later place than the one before"
            )
        firsts.append(first)
        samples.append(samples[-1] + steps * batch)
        tokens.append(tokens[-1] + steps * places)
    places = _per_step(configs[-1])[1]
    if config.train.steps is not None:
        total = config.train.steps
    else:
        assert config.train.tokens is not None
        total = firsts[-1] - 1 + (config.train.tokens - tokens[-1]) // places
    if total < firsts[-1]:
        length = f"train.steps {config.train.steps}" if config.train.steps is not None else f"train.tokens {config.train.tokens:,}"
        raise UsageError(
            f"phases[{len(config.phases) - 1}] begins at {told(config.phases[-1])}, but the run of {length} ends before it has a step: "
            "make the run longer, or begin the phase earlier"
        )
    lasts = [*(first - 1 for first in firsts[1:]), total]
    configs = [c.model_copy(update={"train": c.train.model_copy(update={"steps": total, "tokens": None})}) for c in configs]
    clocks = _clocks(config, configs, firsts, lasts, tokens)
    entries = [None, *range(len(config.phases))]
    return [Span(*span) for span in zip(configs, firsts, lasts, samples, tokens, clocks, entries)]


def begins_schedule(entry: PhaseAt) -> bool:
    return any(key in changes_of(entry, "phases") for key in SCHEDULE)


def changes_of(entry: PhaseAt, where: str) -> dict[str, Any]:
    """{section.key: value} of a phase; a whole section may be given as a mapping. Raises UsageError for keys that a phase cannot set."""
    found: dict[str, Any] = {}
    for key, value in entry.set.items():
        if key in SECTIONS and isinstance(value, Mapping):
            found |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            found[key] = value
    for key in found:
        fixed = next((name for name in FIXED if key == name or key.startswith(f"{name}.")), None)
        if fixed is not None:
            raise UsageError(f"{where} sets {key} to {found[key]!r}, but {FIXED[fixed]}: set it for the whole run, outside of phases")
        if key.split(".")[0] not in SECTIONS or "." not in key:
            raise UsageError(f"{where} sets {key}, but a phase sets section.key of {', '.join(SECTIONS)}: correct the key")
    return found


def with_changes(config: Config, number: int) -> Config:
    """The config with the changes of `config.phases[number]`; the rest of the run's phases stay listed. Raises UsageError."""
    entry, where = config.phases[number], f"phases[{number}].set"
    changes = changes_of(entry, where)
    values = config.plain()
    if begins_schedule(entry):  # lengths that counted from the old schedule's first step mean nothing in the new one
        changes = {"optim.warmup_steps": 0, "optim.decay_steps": None, **changes}
    for key, value in changes.items():
        *path, last = key.split(".")
        node: Any = values
        for part in path:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                raise UsageError(f"{where} sets {key}, but {part} is {node!r}, not a section: correct the key")
        node[last] = value
    try:
        return build_config(values)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def told(entry: PhaseAt) -> str:
    return str(entry.begins) if entry.tokens is None else f"{entry.tokens:,} tokens"


def _configs(config: Config) -> list[Config]:
    """The config of each phase, with `data.chunk` filled in where sequence lengths differ."""
    configs = [config]
    for number in range(len(config.phases)):
        configs.append(with_changes(configs[-1], number))
    lengths = {c.train.seq_len for c in configs}
    if len(lengths) > 1 and config.data.chunk is None:
        configs = [c.model_copy(update={"data": c.data.model_copy(update={"chunk": max(lengths)})}) for c in configs]
    return configs


def _per_step(config: Config) -> tuple[int, int]:
    """Samples and tokens of a step."""
    return config.train.global_batch_size, config.train.global_batch_size * config.train.seq_len


def _clocks(config: Config, configs: list[Config], firsts: list[int], lasts: list[int], tokens: list[int]) -> list[Clock]:
    by_tokens = config.optim.schedule_by == "tokens"
    whole = tokens[-1] + (lasts[-1] - firsts[-1] + 1) * _per_step(configs[-1])[1]
    clocks: list[Clock] = []
    origin = 0  # the phase in which the present schedule began
    for number, now in enumerate(configs):
        if number and begins_schedule(config.phases[number - 1]):
            origin = number
        first = firsts[number]
        if by_tokens:
            unit = _per_step(configs[origin])[1]
            clocks.append(Clock(first, (tokens[number] - tokens[origin]) / unit, _per_step(now)[1] / unit, (whole - tokens[origin]) / unit))
        else:
            clocks.append(Clock(first, first - firsts[origin], 1, lasts[-1] - firsts[origin] + 1))
    return clocks
