"""Smaller runs whose facts add up to those of the run: few layers and micro-batches instead of all, since what a step does is linear in
both. tests/trace/test_reduced.py compares with whole runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from megascale.config.axes import data_parts
from megascale.config.layout import axis_sizes, micro_batches
from megascale.config.schema import Config
from megascale.config.support import check
from megascale.errors import MegascaleError

SMALL = 24  # layers × micro-batches that are not worth reducing

UNEVEN = (
    "moeut",
    "encoder_layers",
    "spacetime",
    "pattern",
    "pattern_first",
    "pattern_last",
    "ffn_sizes",
    "layer_coefficients",
    "norm_eps_of",
)  # keys of layers that differ


class Run(NamedTuple):
    """A config to run with this many micro-batches, and its weight in the sum of what adds up. `memory`: its weight in the sum of bytes
    alive, which without stages stay the same once micro-batches follow each other.
    """

    config: Config
    micro_batches: int
    weight: float = 1.0
    memory: float = 1.0


def runs_of(config: Config, ranks: int) -> list[Run]:
    """The runs of a checked config; itself if it cannot be reduced."""
    m, layers = micro_batches(config, ranks), config.model.num_layers
    if layers * m <= SMALL * config.parallel.pp:
        return [Run(config, m)]
    depths = _points(layers, _depths(config))
    counts = _points(m, _counts(config, m))
    # A pipeline's runtime keeps what it sends to the end of the step.
    grows = config.parallel.accumulation == "layered" or config.parallel.pp > 1
    of_memory = [w if grows else float(i == len(counts) - 1) for i, (_, w) in enumerate(counts)]
    runs = [Run(_smaller(config, ranks, n, k), k, v * w, v * u) for n, v in depths for (k, w), u in zip(counts, of_memory)]
    try:
        for run in runs:
            check(run.config, ranks)
    except MegascaleError:  # a rule about the number of layers or micro-batches
        return [Run(config, m)]
    return runs


def _depths(config: Config) -> tuple[int, int] | None:
    """Two small numbers of layers whose stages have the shape of the whole, if there are such."""
    model, p = config.model, config.parallel
    if p.pp_layers or any(getattr(model, key, None) for key in UNEVEN) or p.recompute == "nested" or p.cp_method == "dsp":
        return None
    stages = p.pp * p.stages_per_rank if p.pp > 1 else 1
    period = stages * (model.moe.every if model.moe is not None else 1)
    few, more = (period, 2 * period) if p.pp > 1 else (4 * period, 6 * period)
    return None if model.num_layers % stages or model.num_layers % (more - few) or model.num_layers <= 2 * more else (few, more)


def _counts(config: Config, m: int) -> tuple[int, int] | None:
    """Two small numbers of micro-batches at which a step's beginning, middle and end look as in the whole."""
    p = config.parallel
    # Of several stages on a rank the first one's gradients come after the last one's first backward passes.
    pipeline = ((p.stages_per_rank + 1) * p.pp, p.pp)
    first, step = pipeline if p.pp > 1 else (p.breadth_first, p.breadth_first) if p.breadth_first else (2, 1)
    return None if m <= first + step + 1 else (first, first + step)


def _points(whole: int, two: tuple[int, int] | None) -> list[tuple[int, float]]:
    """The points of a line and their weights at `whole`."""
    if two is None:
        return [(whole, 1.0)]
    a, b = two
    return [(a, (b - whole) / (b - a)), (b, (whole - a) / (b - a))]


def _smaller(config: Config, ranks: int, layers: int, count: int) -> Config:
    batch = count * config.train.micro_batch_size * data_parts(axis_sizes(config.parallel, ranks))
    train = config.train.model_copy(update={"global_batch_size": batch})
    return config.model_copy(update={"model": config.model.model_copy(update={"num_layers": layers}), "train": train})


def combined(parts: Iterable[tuple[float, Mapping[str, Any]]]) -> dict[str, Any]:
    """The weighted sum of facts, number by number."""
    total: dict[str, Any] = {}
    for weight, facts in parts:
        for name, value in facts.items():
            if isinstance(value, Mapping):
                total[name] = combined([(1.0, total.get(name, {})), (weight, value)])
            else:
                total[name] = total.get(name, 0) + weight * value
    return total
