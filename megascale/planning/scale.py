"""`megascale plan --scale 8..100000`: how time, cost and efficiency change with the number of GPUs.

Strong scaling keeps the batch, so that its row with the least days is the shortest time in which the run can be trained at all; weak
scaling keeps the sequences per GPU. Layered accumulation and modular pipelines (looped_bfs with as many stages as layers allow,
arXiv 2106.02679) are searched apart from what was there before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megascale.config.schema import Config
from megascale.errors import UsageError
from megascale.planning.cluster import Cluster
from megascale.planning.memory import peak_of
from megascale.planning.search import SCHEDULES, Layout, accepted, axes, variants
from megascale.planning.setting import setting_of
from megascale.planning.step import Links, predict_setting
from megascale.planning.weights import units_of
from megascale.planning.words import facts
from megascale.sizes import count_words

METHODS = ("plain", "layered", "modular", "all")
NAMES = {
    "plain": "depth-first, 1F1B",
    "layered": "+ layered accumulation",
    "modular": "+ modular pipelines",
    "all": "+ all schedules",
}
BUDGETS = (1, 3, 10, 30, 100)  # days of all GPUs


def counts_of(text: str) -> list[int]:
    """Numbers of GPUs, doubling: "8..64" is 8, 16, 32, 64. Raises UsageError for anything else."""
    first, dots, last = text.partition("..")
    if not (dots and first.isascii() and first.isdigit() and last.isascii() and last.isdigit()):
        raise UsageError(f"--scale is {text!r}: write two numbers of GPUs with .. between them, such as 8..100000")
    low, high = int(first), int(last)
    if not 1 <= low <= high <= 2**20:
        raise UsageError(f"--scale is {text}: the first number must be 1 or more and the second at least as large, at most {2**20:,}")
    return [low * 2**i for i in range((high // low).bit_length())]


def enlarged(cluster: Cluster, ranks: int) -> Cluster:
    """The cluster with more nodes in its last pool, if it is too small; links stay as they are."""
    if ranks <= cluster.gpus:
        return cluster
    last = cluster.pools[-1]
    nodes = last.nodes + -(-(ranks - cluster.gpus) // last.gpus_per_node)
    return cluster.model_copy(update={"pools": (*cluster.pools[:-1], last.model_copy(update={"nodes": nodes}))})


def methods_of(config: Config) -> tuple[str, ...]:
    """The methods that a layout belongs to: each has what the one before it has."""
    p = config.parallel
    if p.accumulation == "layered":
        return METHODS[1:]
    if p.pp > 1 and p.pp_schedule == "looped_bfs":
        return METHODS[2:]
    return METHODS if p.pp == 1 or p.pp_schedule == "1f1b" else METHODS[3:]


def best_layouts(config: Config, ranks: int, cluster: Cluster) -> dict[str, Layout]:
    """By method the fastest layout that fits and that the config's rules accept; a method without one is left out."""
    links = Links(cluster, ranks)
    node = min(pool.gpus_per_node for pool in cluster.pools)
    found: list[tuple[float, int, Config]] = []
    for number, changed in enumerate(_choices(config, ranks, node)):
        setting = setting_of(changed, ranks, links.cpu)
        memory = peak_of(setting)
        if sum(memory.values()) <= links.room:
            found.append((predict_setting(setting, links, memory).step_seconds, number, changed))
    best: dict[str, Layout] = {}
    for _, _, changed in sorted(found):
        missing = [name for name in methods_of(changed) if name not in best]
        if missing and (checked := accepted(changed, ranks, {})):
            layout = Layout(checked, predict_setting(setting_of(checked, ranks, links.cpu), links))
            best |= dict.fromkeys(missing, layout)
        if len(best) == len(METHODS):
            break
    return best


def _choices(config: Config, ranks: int, node: int) -> Iterator[Config]:
    """As in `search`, with a modular pipeline of one layer a stage where layers divide."""
    for base in axes(config, ranks, node):
        layers = config.model.num_layers
        finest = layers // base.pp if layers % base.pp == 0 else 1
        more = [("looped_bfs", finest)] if finest > 1 and ("looped_bfs", finest) not in SCHEDULES else []
        yield from variants(config, base, [*SCHEDULES, *more])


def scale(config: Config, counts: list[int], cluster: Cluster) -> dict[str, Any]:
    """All tables as JSON. Raises UsageError if nothing fits at any number of GPUs."""
    strong = [_row(config, ranks, enlarged(cluster, ranks)) for ranks in counts]
    first = next((r for r in strong if r["best"]), None)
    if first is None:
        raise UsageError(
            f"no layout of {config.model.num_layers} layers fits on {counts[0]:,} to {counts[-1]:,} GPUs of {cluster.name} with "
            f"train.global_batch_size {config.train.global_batch_size:,}: ask for more GPUs, or see with --gpus "
            "what one number lacks"
        )
    batch = config.train.global_batch_size
    weak = []
    for ranks in (n for n in counts if n >= first["gpus"]):
        train = config.train.model_copy(update={"global_batch_size": batch * ranks // first["gpus"]})
        weak.append(_row(config.model_copy(update={"train": train}), ranks, enlarged(cluster, ranks)))
    for rows in (strong, weak):
        for r in rows:
            r["efficiency"] = _speed(r) / _speed(first) if r["best"] else None
    days = {name: [(r["days"][name], r["gpus"]) for r in strong if r["days"][name] is not None] for name in METHODS}
    return {
        "cluster": cluster.name,
        "cluster_gpus": cluster.gpus,
        "batch_tokens": batch * config.train.seq_len,
        "critical": critical(config),
        "strong": strong,
        "weak": weak,
        "shortest": {name: {"days": min(d)[0], "gpus": min(d)[1]} if d else None for name, d in days.items()},
        "budgets": budgets(config, max((r for r in strong if r["best"]), key=lambda r: r["best"]["tokens_per_second"])),
    }


def _speed(row: dict[str, Any]) -> float:
    return float(row["best"]["tokens_per_second"] / row["gpus"])


def _row(config: Config, ranks: int, cluster: Cluster) -> dict[str, Any]:
    """One number of GPUs: the best layout, and the days of training by method, failures not counted."""
    best = best_layouts(config, ranks, cluster)
    steps = config.train.total_steps
    days = {name: steps * best[name].prediction.step_seconds / 86400 if name in best else None for name in METHODS}
    layouts = {name: layout.words for name, layout in best.items()}
    batch = config.train.global_batch_size
    return {"gpus": ranks, "batch": batch, "days": days, "layouts": layouts, "best": facts(best["all"], ranks, cluster) if best else None}


def critical(config: Config) -> dict[str, float]:
    """Kaplan et al. (arXiv 2001.08361): the loss of a model trained to the end, L = (8.8e13/N)^0.076, and the batch in tokens at which
    more data ranks stop saving time, 2e8/L^(1/0.21). N are the weights in the layers' products. Their data and vocabulary are not ours.
    """
    weights = sum(w.numel for unit in units_of(config).layers for w in unit.weights if w.product)
    loss = float((8.8e13 / weights) ** 0.076)
    tokens = float(2e8 / loss ** (1 / 0.21))
    return {"loss": loss, "tokens": tokens, "sequences": tokens / config.train.seq_len}


def budgets(config: Config, row: dict[str, Any]) -> list[dict[str, float]]:
    """Tokens that some days of the fastest row train on, beside the tokens and weights that suit the same FLOPs best by the fit of
    Hoffmann et al. (arXiv 2203.15556, approach 3): L = 1.69 + 406.4/N^0.34 + 410.7/D^0.28 with C = 6ND.
    """
    weights = float(units_of(config).parameters)
    found = []
    for days in BUDGETS:
        tokens = 86400 * days * row["best"]["goodput"] * row["best"]["tokens_per_second"]
        flops = 6 * weights * tokens
        best = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62) * (flops / 6) ** (0.28 / 0.62)
        found.append(
            {
                "days": float(days), "gpus": float(row["gpus"]), "tokens": tokens, "loss": fitted_loss(weights, tokens),
                "best_weights": best, "best_tokens": flops / 6 / best, "best_loss": fitted_loss(best, flops / 6 / best),
            }
        )  # fmt: skip
    return found


def fitted_loss(weights: float, tokens: float) -> float:
    """Hoffmann et al.'s loss of so many weights after so many tokens."""
    return float(1.69 + 406.4 / weights**0.34 + 410.7 / tokens**0.28)


def scale_lines(found: dict[str, Any]) -> list[str]:
    """The tables for people."""
    need = found["critical"]
    text = [
        f"critical batch about {count_words(need['tokens'])} tokens ({need['sequences']:,.0f} sequences) by the fit of arXiv 2001.08361; "
        f"this config's is {count_words(found['batch_tokens'])}",
        *_shortest(found),
        "",
        "the same batch (strong scaling), days by method:",
        f"{'GPUs':>9}" + "".join(f"{NAMES[m]:>24}" for m in METHODS) + f"{'MFU':>8}{'efficiency':>12}{'cost':>16}",
    ]
    for r in found["strong"]:
        days = "".join(f"{'–' if r['days'][m] is None else format(r['days'][m], ',.2f'):>24}" for m in METHODS)
        text.append(f"{r['gpus']:>9,}{days}{_end(r)}" + (f"{'$' + format(r['best']['dollars'], ',.0f'):>16}" if r["best"] else ""))
    text += [
        "",
        "the same sequences per GPU (weak scaling):",
        f"{'GPUs':>9}{'batch':>10}{'tokens/s':>12}{'MFU':>8}{'efficiency':>12}  layout",
    ]
    for r in found["weak"]:
        speed = count_words(r["best"]["tokens_per_second"]) if r["best"] else "–"
        text.append(f"{r['gpus']:>9,}{r['batch']:>10,}{speed:>12}{_end(r)}  {r['layouts'].get('all', 'no layout fits')}")
    text += ["", f"tokens for a budget on {found['budgets'][0]['gpus']:,.0f} GPUs, and what suits it best by the fit of arXiv 2203.15556:"]
    text += [
        f"{b['days']:>6g} days {count_words(b['tokens']):>8} tokens, loss {b['loss']:.3f}; best: {count_words(b['best_weights'])} weights, "
        f"{count_words(b['best_tokens'])} tokens, loss {b['best_loss']:.3f}"
        for b in found["budgets"]
    ]
    most = found["strong"][-1]["gpus"]
    if most > found["cluster_gpus"]:
        text += ["", f"beyond {found['cluster_gpus']:,} GPUs the cluster's last pool was given more nodes with the same links"]
    return text


def _shortest(found: dict[str, Any]) -> list[str]:
    """The shortest training time by method."""
    times = {name: best for name, best in found["shortest"].items() if best}
    return [f"shortest time, {NAMES[name]}: {best['days']:,.2f} days on {best['gpus']:,} GPUs" for name, best in times.items()]


def _end(r: dict[str, Any]) -> str:
    if not r["best"]:
        return f"{'–':>8}{'–':>12}"
    return f"{100 * r['best']['mfu']:6.1f} %{100 * r['efficiency']:10.1f} %"
