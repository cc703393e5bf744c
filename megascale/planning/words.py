"""The planner's result as lines for people and as JSON."""

from __future__ import annotations

import io
import math
from typing import Any

from ruamel.yaml import YAML

from megascale.config.schema import Config, Parallel
from megascale.errors import UsageError
from megascale.planning.cluster import Cluster
from megascale.planning.goodput import Goodput, goodput
from megascale.planning.memory import stored_bytes
from megascale.planning.search import Found, Layout
from megascale.planning.setting import ITEMSIZE
from megascale.planning.weights import units_of
from megascale.sizes import byte_words, count_words, duration

WORDS = {
    "compute": "computing",
    "recompute": "recomputing",
    "bubble": "waiting in the pipeline",
    "update": "updating",
    "launch": "launching kernels",
    "tp": "exchanges over tp",
    "cp": "exchanges over cp",
    "ep": "exchanges over ep",
    "pp": "messages between stages",
    "dp": "gathering weights and reducing gradients",
}


def facts(layout: Layout, ranks: int, cluster: Cluster) -> dict[str, Any]:
    """One layout as JSON; days, dollars and energy are those of the whole run, failures included."""
    p, config = layout.prediction, layout.config
    kept = reliability(layout, ranks, cluster)
    hours = config.train.total_steps * p.step_seconds / kept.share / 3600 if kept.share else math.inf
    dollars, watts = per_gpu(cluster, ranks)
    return {
        "layout": layout.words,
        "parallel": changed(config.parallel),
        "micro_batch_size": config.train.micro_batch_size,
        "step_seconds": p.step_seconds,
        "memory_bytes": round(p.memory_bytes),
        "memory": {kind: round(size) for kind, size in p.memory.items()},
        "mfu": p.mfu,
        "tokens_per_second": p.tokens_per_second,
        "seconds": p.parts,
        "sent_bytes": {axis: round(size) for axis, size in p.sent.items()},
        "goodput": kept.share,
        "checkpoint_seconds": None if math.isinf(kept.interval) else kept.interval,
        "days": hours / 24,
        "dollars": hours * dollars * ranks,
        "megawatt_hours": hours * watts * ranks / 1e6,
    }


def reliability(layout: Layout, ranks: int, cluster: Cluster) -> Goodput:
    """Goodput of a layout with the failures of the pools that it uses."""
    stored = stored_bytes(layout.config, ranks)
    rates, left = 0.0, ranks
    for pool in cluster.pools:
        rates, left = rates + min(left, pool.gpus) * pool.failures_per_gpu_hour, max(0, left - pool.gpus)
    held = stored["parameters"] + stored["optimizer"]
    total = units_of(layout.config).parameters * held / stored["parameters"] * ITEMSIZE[layout.config.precision.storage]
    return goodput(ranks, rates / ranks, held, total, cluster.checkpoint_bytes_per_second, cluster.restart_seconds)


def per_gpu(cluster: Cluster, ranks: int) -> tuple[float, float]:
    """Mean dollars per hour and watts of the devices in use."""
    dollars = watts = 0.0
    left = ranks
    for pool in cluster.pools:
        used = min(left, pool.gpus)
        dollars, watts, left = dollars + used * pool.dollars_per_gpu_hour, watts + used * pool.watts_per_gpu, left - used
    return dollars / ranks, watts / ranks


def changed(parallel: Parallel) -> dict[str, Any]:
    """The keys of `parallel` that are not as by default, for a config file."""
    plain = parallel.model_dump(mode="json", by_alias=True)
    default = Parallel().model_dump(mode="json", by_alias=True)
    return {key: value for key, value in plain.items() if value != default[key]}


def report(found: Found, ranks: int, cluster: Cluster) -> dict[str, Any]:
    """Everything as JSON."""
    return {
        "cluster": cluster.name,
        "gpus": ranks,
        "layouts": [facts(layout, ranks, cluster) for layout in found.layouts],
        "pareto": [facts(layout, ranks, cluster) for layout in found.pareto],
        "tried": found.tried,
        "too_large": found.unfit,
        "refused": found.refused,
    }


def lines(found: Found, config: Config, ranks: int, cluster: Cluster, shown: int = 8) -> list[str]:
    """The report for people. Raises UsageError if nothing fits, with the nearest layout and what it lacks."""
    if not found.layouts:
        raise UsageError(nothing_fits(found, ranks, cluster))
    best, first = found.layouts[0], facts(found.layouts[0], ranks, cluster)
    p = best.prediction
    every = first["checkpoint_seconds"]
    text = [
        f"best of {found.tried:,} layouts on {ranks:,} × {cluster.pools[0].device.name}: {best.words}",
        f"  {duration(p.step_seconds)} a step, {count_words(p.tokens_per_second)} tokens/s, MFU {100 * p.mfu:.1f} %, "
        f"{byte_words(p.memory_bytes)} of {byte_words(p.room)}",
        f"  run of {count_words(config.train.total_steps * config.train.global_batch_size * config.train.seq_len)} tokens: "
        f"{first['days']:.1f} days, ${first['dollars']:,.0f}, {first['megawatt_hours']:,.1f} MWh"
        + ("" if every is None else f"; goodput {100 * first['goodput']:.1f} % with a checkpoint every {duration(every)}"),
        f"  {found.unfit:,} layouts need too much memory",
        "",
        f"{'step':>10}{'memory':>10}{'MFU':>7}  layout",
    ]
    for layout in found.layouts[:shown]:
        q = layout.prediction
        text.append(f"{duration(q.step_seconds):>10}{byte_words(q.memory_bytes):>10}{100 * q.mfu:6.1f}%  {layout.words}")
        if layout is not best:
            text.append(f"{'':29}{why(layout, best)}")
    text += ["", "less memory for more time:"]
    text += [
        f"{duration(q.step_seconds):>10}{byte_words(q.memory_bytes):>10}{100 * q.mfu:6.1f}%  {layout.words}"
        for layout in thinned(found.pareto, shown)
        if (q := layout.prediction)
    ]
    return [*text, "", "# in the config, replace the section parallel by this one, and change these keys of train:", *pasted(best)]


def why(layout: Layout, best: Layout) -> str:
    """Why a layout is slower than the best, in words."""
    a, b = layout.prediction, best.prediction
    more = {name: a.parts.get(name, 0.0) - b.parts.get(name, 0.0) for name in {*a.parts, *b.parts}}
    name, seconds = max(more.items(), key=lambda item: item[1])
    slower = a.step_seconds / b.step_seconds - 1
    if slower < 0.001:
        return f"as fast, with {byte_words(a.memory_bytes)} in place of {byte_words(b.memory_bytes)}"
    return f"{100 * slower:.1f} % slower: {duration(max(0.0, seconds))} more for {WORDS.get(name, name)}"


def thinned(layouts: list[Layout], most: int) -> list[Layout]:
    """At most so many of a list, the ends among them."""
    if len(layouts) <= most:
        return layouts
    return [layouts[round(i * (len(layouts) - 1) / (most - 1))] for i in range(most)]


def pasted(layout: Layout) -> list[str]:
    """The sections to paste."""
    values = {"parallel": changed(layout.config.parallel), "train": {"micro_batch_size": layout.config.train.micro_batch_size}}
    out = io.StringIO()
    YAML().dump(values, out)
    return out.getvalue().rstrip().splitlines()


def nothing_fits(found: Found, ranks: int, cluster: Cluster) -> str:
    """The nearest layout and what it lacks, or why there is none."""
    if found.nearest is None:
        reasons = "; ".join(sorted(found.refused, key=lambda r: -found.refused[r])[:2])
        return f"no layout of {ranks} GPUs suits this config" + (f": {reasons}" if reasons else "")
    p = found.nearest.prediction
    largest = max(p.memory, key=lambda kind: p.memory[kind])
    return (
        f"none of {found.tried:,} layouts fits on {ranks:,} GPUs of {cluster.name}: the nearest, {found.nearest.words}, needs "
        f"{byte_words(p.memory_bytes)} of {byte_words(p.room)}, {byte_words(p.memory_bytes - p.room)} too much, most of it {largest}; use "
        "more GPUs, devices with more memory, or a smaller model or sequence"
    )
