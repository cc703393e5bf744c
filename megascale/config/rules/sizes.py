"""Sizes that are too large to count or lay out, refused before anything of that size is built."""

from __future__ import annotations

import math

from megascale.config.layout import micro_batches
from megascale.config.rules.rule import Rule
from megascale.config.schema import Config, Model

PARAMETERS = 2**56  # at 16 bytes each this stays below 2^63, torch's limit for bytes
COMPUTATIONS = 2**20  # in a step's schedule, which is built and simulated before the first step

SIZE_RULES: tuple[Rule, ...] = (
    Rule(
        "model_size",
        (
            "model.num_layers",
            "model.hidden_size",
            "model.num_heads",
            "model.head_dim",
            "model.ffn_size",
            "model.vocab_size",
            "train.seq_len",
        ),
        lambda c, n: _parameters_at_most(c.model, c.train.seq_len) > PARAMETERS,
        f"these sizes give more than {PARAMETERS:.0e} parameters, whose bytes torch cannot count",
        "look for a digit too many, also in model.moe and the other sections of model",
    ),
    Rule(
        "schedule_length",
        ("train.global_batch_size", "train.micro_batch_size", "parallel.pp", "parallel.accumulation", "model.num_layers"),
        lambda c, n: _computations(c, n) > COMPUTATIONS,
        f"the schedule of one step would have more than {COMPUTATIONS:,} computations (micro-batches × stages, forward and backward)",
        "choose a larger micro_batch_size, more data ranks, or a smaller global_batch_size",
    ),
)


def _parameters_at_most(model: Model, seq_len: int) -> int:
    """An upper bound without building anything: every layer counts as the most expensive kind."""
    d, heads = model.hidden_size, model.num_heads * model.head_dim
    widths = [model.ffn_size, *(model.ffn_sizes or ())]
    ffn, banks, attention = max(widths), 1, 1
    if model.moe is not None:
        ffn, banks = max(ffn, model.moe.ffn_size or 1), model.moe.num_experts + model.moe.num_shared
    if model.moeut is not None:
        attention = model.moeut.attention_experts
    products = (
        max(4 * (d + 1) * heads * attention, model.attention_row.weights(model) if model.attention_sized else 0)
        + 3 * (d + 1) * ffn * banks
        + d * banks
    )
    if model.tokenformer is not None:
        products += 16 * model.tokenformer.tokens * (d + heads + ffn)
    tables = (model.vocab_size or 1) + (model.source_vocab_size or 1) + seq_len + model.relative_buckets
    if model.spacetime is not None:
        fields = model.spacetime
        tables += (
            fields.channels * math.prod(fields.patch) + math.prod(fields.shape) + (fields.text_vocab_size or 1) + (fields.text_len or 1)
        )
    return 2 * model.total_layers * products + 2 * tables * (d + heads)


def _computations(config: Config, ranks: int) -> int:
    """Computations in a step of a pipeline or of layered accumulation; other orders are not written out."""
    if config.parallel.accumulation == "layered":
        return 2 * micro_batches(config, ranks) * (config.model.total_layers + 2)
    if config.parallel.pp == 1:
        return 0
    return 2 * micro_batches(config, ranks) * config.parallel.pp * config.parallel.stages_per_rank
