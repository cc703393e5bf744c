"""Which keys cannot be combined: one table for validation, docs and tests.

A rule is a sentence about a resolved config. It refuses if `applies` is true; whatever no rule refuses, runs. The rules are in `rules/`
by subject, and here in the order in which messages list them.
"""

from __future__ import annotations

from collections.abc import Iterator

from megascale.config.layout import axis_sizes, data_parts
from megascale.config.rules.axes import AXIS_RULES
from megascale.config.rules.engines import ENGINE_RULES
from megascale.config.rules.experts import EXPERT_RULES
from megascale.config.rules.general import GENERAL_RULES
from megascale.config.rules.kinds import KIND_RULES
from megascale.config.rules.model import MODEL_RULES
from megascale.config.rules.pairs import PAIR_RULES
from megascale.config.rules.precision import PRECISION_RULES
from megascale.config.rules.rule import Rule
from megascale.config.rules.sizes import SIZE_RULES
from megascale.config.schema import Config
from megascale.config.schema.section import Section
from megascale.errors import UsageError

RULES: tuple[Rule, ...] = (
    *MODEL_RULES,
    *EXPERT_RULES,
    *KIND_RULES,
    *PAIR_RULES,
    *AXIS_RULES,
    *ENGINE_RULES,
    *PRECISION_RULES,
    *GENERAL_RULES,
    *SIZE_RULES,
)


def refusals(config: Config, ranks: int) -> list[Rule]:
    """The rules that refuse this config on this many ranks."""
    return [rule for rule in RULES if any(rule.applies(c, ranks) for _, c in _judged(rule, config))]


def check(config: Config, ranks: int) -> Config:
    """The config with its data axes resolved for `ranks`. Raises UsageError naming every disagreeing key, its value and the fix."""
    refused = [
        (rule, kind, c)
        for rule in RULES
        for kind, c in [next(((k, c) for k, c in _judged(rule, config) if rule.applies(c, ranks)), ("", None))]
        if c is not None
    ]
    if refused:
        lines = []
        for rule, kind, judged in refused:
            values = ", ".join(f"{key} is {_value(judged, key, ranks)}" for key in rule.keys)
            lines.append(f"{f'in layers of kind {kind}, ' if kind else ''}{values}: {rule.why}; {rule.fix}")
        raise UsageError("\n  ".join(["this combination does not work:", *lines]) if len(lines) > 1 else lines[0])
    sizes = axis_sizes(config.parallel, ranks)
    resolved = config.parallel.model_copy(update={"dp_shard": sizes["dp_shard"], "dp_replicate": sizes["dp_replicate"]})
    return config.model_copy(update={"parallel": resolved})


def _judged(rule: Rule, config: Config) -> Iterator[tuple[str, Config]]:
    """What a rule is asked about: the config, or for each kind of layer the config of a model with such layers only."""
    if rule.whole or not config.model.kinds:
        yield "", config
        return
    for name in config.model.kinds:
        yield name, config.model_copy(update={"model": config.model.of_kind(name)})


def markdown_table() -> str:
    """The table in docs/layouts.md."""
    lines = ["| keys | refused because | do instead | |", "|---|---|---|---|"]
    for rule in RULES:
        keys = ", ".join(f"`{key}`" for key in rule.keys)
        lines.append(f"| {keys} | {rule.why} | {rule.fix} | {'planned' if rule.later else ''} |")
    return "\n".join(lines)


def padding_note(config: Config) -> str | None:
    """A warning if a step's samples do not fill the micro-batches of all ranks; padding costs time but changes nothing."""
    parts = data_parts(dict(config.parallel))
    batch, slots = config.train.global_batch_size, config.train.micro_batch_size * parts
    places = -(-batch // slots) * slots
    if places == batch:
        return None
    return (
        f"global_batch_size {batch} does not fill {places} places (micro_batch_size {config.train.micro_batch_size} × "
        f"{parts} data ranks × {places // slots} micro-batches): {100 * (places - batch) / places:.0f} % of the work is "
        "padding; the loss is not affected"
    )


def _value(config: Config, key: str, ranks: int) -> object:
    if key == "grow":
        return f"at steps {', '.join(str(growth.step) for growth in config.grow)}"
    if key == "evaluate":
        return ", ".join(entry.name for entry in config.evaluate)
    value: object = config
    for part in key.split("."):
        value = getattr(value, part, None)
    # -1 depends on the number of ranks, which no key shows.
    return f"-1 on {ranks} ranks" if key == "parallel.dp_shard" and value == -1 else shown(value)


def shown(value: object) -> object:
    """A value for a sentence: of sections, as of kinds of layers, what they set."""
    if isinstance(value, dict) and value and all(isinstance(part, Section) for part in value.values()):
        return {name: part.model_dump(mode="json", exclude_unset=True) for name, part in value.items()}
    return value
