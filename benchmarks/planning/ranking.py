"""Does the planner rank layouts as they run? Layouts on four CPU ranks of this machine, predicted after calibrating and then timed.

    python -m benchmarks.planning.ranking [--layouts 20] [--rounds 3] [--cluster FILE]

It needs a quiet machine, calibrates first (or takes a cluster file of an earlier `megascale plan --calibrate`), picks layouts evenly from
the fastest to the slowest predicted one, and times each as ranks in turn, round after round; a layout's time is the median over rounds of
its median step. Kendall's τ compares the two orders; `first_over_best` is the time of the layout that the planner puts first over that of
the fastest.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from benchmarks.common import machine, one_step, trained, write
from megascale.config.layout import describe
from megascale.config.load import build_config
from megascale.config.schema import Config
from megascale.config.support import refusals
from megascale.planning.calibrate import measured_here
from megascale.planning.cluster import Cluster, load_cluster
from megascale.planning.search import axes, variants
from megascale.planning.setting import setting_of
from megascale.planning.step import Links, predict_setting
from megascale.trace.step import batch_of
from tests.ranks import run_ranks

RANKS, STEPS, WARM = 4, 3, 2
VALUES: dict[str, Any] = {
    "model": {"num_layers": 4, "hidden_size": 256, "num_heads": 8, "ffn_size": 768, "vocab_size": 2048},
    "train": {"steps": 1, "seq_len": 256, "global_batch_size": 16},
    "data": {"train": "none"},
    "precision": {"compute": "fp32"},
    "parallel": {"compile": False},
    "run": {"device": "cpu"},
}


def kendall(a: list[float], b: list[float]) -> float:
    """τ of two orders of the same things: the share of pairs in the same order less that of pairs in the other one."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    signs = [((a[i] > a[j]) - (a[i] < a[j])) * ((b[i] > b[j]) - (b[i] < b[j])) for i, j in pairs]
    return sum(signs) / len(pairs)


def candidates(cluster: Cluster, count: int) -> list[tuple[float, Config]]:
    """(predicted seconds, config) of at most `count` valid layouts, from the fastest to the slowest."""
    base, links = build_config(VALUES), Links(cluster, RANKS)
    found = []
    for config in (c for p in axes(base, RANKS, RANKS) for c in variants(base, p)):
        if not refusals(config, RANKS):
            found.append((predict_setting(setting_of(config, RANKS, links.cpu), links).step_seconds, config))
    found.sort(key=lambda pair: pair[0])
    if len(found) <= count:
        return found
    return [found[round(i * (len(found) - 1) / (count - 1))] for i in range(count)]


def timed(config: Config, micro_batches: int) -> float:
    """Seconds of a step on this rank."""
    device = torch.device("cpu")
    model, engine = trained(config, RANKS, device)
    del model

    def integers(shape: tuple[int, ...], vocabulary: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, shape)

    batches = [batch_of(config, device, integers) for _ in range(micro_batches)]
    taken = []
    for _ in range(WARM + STEPS):
        dist.barrier()
        start = time.perf_counter()
        one_step(engine, batches, 1e-4)
        dist.barrier()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[WARM:])


def name_of(config: Config) -> str:
    p = config.parallel
    kept = "" if p.reshard_after_forward is True else f", reshard {p.reshard_after_forward}"
    layered = ", layered" if p.accumulation == "layered" else ""
    return f"{describe(p)}, {p.recompute}, micro-batch {config.train.micro_batch_size}{kept}{layered}"


def main(layouts: int = 20, rounds: int = 3, cluster: Annotated[Path | None, typer.Option()] = None) -> None:
    known = load_cluster(cluster) if cluster is not None else measured_here(RANKS, None)
    chosen = candidates(known, layouts)
    seconds: list[list[float]] = [[] for _ in chosen]
    for _ in range(rounds):
        for times, (_, config) in zip(seconds, chosen):
            times.append(max(run_ranks(RANKS, timed, config, setting_of(config, RANKS).micro_batches, timeout=300)))
    measured = [statistics.median(times) for times in seconds]
    predicted = [p for p, _ in chosen]
    result = {
        "machine": machine(),
        "cluster": known.model_dump(mode="json", exclude_none=True),
        "config": VALUES,
        "kendall_tau": kendall(predicted, measured),
        "first_over_best": measured[0] / min(measured),
        "layouts": [
            {"layout": name_of(config), "predicted_seconds": p, "measured_seconds": m, "rounds": times}
            for (p, config), m, times in zip(chosen, measured, seconds)
        ],
    }
    write(__file__, "ranking", result)


if __name__ == "__main__":
    typer.run(main)
