"""Layouts of a config on a number of ranks: enumerated, pruned by memory, predicted, ranked, and checked by the config's own rules.

The rules decide what is valid. Sizes that cannot divide are skipped before, which is faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megascale.config.layout import describe
from megascale.config.schema import Config, Parallel
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.planning.cluster import Cluster
from megascale.planning.memory import peak_of
from megascale.planning.setting import setting_of
from megascale.planning.step import Links, Prediction, predict_setting

SCHEDULES = (("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 4), ("looped_bfs", 2), ("looped_bfs", 4), ("zbv", 1))
RECOMPUTE = ("none", "selective", "full")
LISTED = 20  # layouts that are offered
LONG = 32768  # tokens of a sequence from which cp is tried even if there are sequences for all ranks and stages
FEW = 8  # most ranks of cp that are tried only to keep a pipeline busy
TENSOR = 16  # most tensor ranks that are tried


@dataclass(frozen=True)
class Layout:
    """A valid layout: the checked config, and what it takes."""

    config: Config
    prediction: Prediction

    @property
    def words(self) -> str:
        p, train = self.config.parallel, self.config.train
        kept = "" if p.reshard_after_forward is True else f", reshard_after_forward {str(p.reshard_after_forward).lower()}"
        return f"{describe(p)}, recompute {p.recompute}, micro-batch {train.micro_batch_size}{kept}"


@dataclass(frozen=True)
class Found:
    """The result of a search, best first. `pareto`: the fitting ones with less memory than any faster one.

    Of `tried` layouts `unfit` need too much memory; `refused` counts the rules' sentences; `nearest`, if none fits, lacks least.
    """

    layouts: list[Layout]
    pareto: list[Layout]
    tried: int
    unfit: int
    refused: dict[str, int]
    nearest: Layout | None


def divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def axes(config: Config, ranks: int, node: int) -> Iterator[Parallel]:
    """Sizes of axes whose product is the number of ranks and which divide what they split."""
    m, train, base = config.model, config.train, config.parallel
    for tp in divisors(ranks, min(TENSOR, m.num_heads)):
        if m.num_heads % tp or m.ffn_size % tp or (tp > 1 and train.seq_len % tp):
            continue
        for pp in divisors(ranks // tp, min(64, m.num_layers)):
            for cp in divisors(ranks // tp // pp, min(64, train.seq_len // (2 * tp))):
                data = ranks // tp // pp // cp
                scarce, idle = data * cp > train.global_batch_size, data * cp * pp > train.global_batch_size
                # Sequences are split where they are long, or where whole ones would leave ranks or stages of a pipeline idle.
                if data > train.global_batch_size or (cp > 1 and train.seq_len < LONG and not scarce and not (idle and cp <= FEW)):
                    continue
                eps = [1] if m.moe is None else [e for e in divisors(m.moe.num_experts, 64) if (data * cp) % e == 0]
                for shard in shards(data, tp * cp, node, ranks):
                    for ep in eps:
                        if shard * cp % ep:
                            continue
                        yield base.model_copy(
                            update={
                                "tp": tp, "pp": pp, "cp": cp, "dp_shard": shard, "dp_replicate": data // shard, "ep": ep, "etp": None,
                                "tp_sequence": tp > 1, "pp_layers": None, "cp_method": "ring", "cp_ulysses": 1, "engine": "fsdp2",
                                "accumulation": "depth_first", "breadth_first": None, "pp_virtual": 1, "offload": (),
                                "update_in_backward": False, "reshard_after_forward": True, "offload_dir": None,
                                "activation_budget": None, "tp_async": base.tp_async and tp > 1,
                                "cp_pieces": base.cp_pieces if cp > 1 else 2, "ep_rows": base.ep_rows if ep > 1 else None,
                            }
                        )  # fmt: skip


def shards(data: int, inside: int, node: int, ranks: int) -> list[int]:
    """Ways to spread data ranks over shards and replicas: all shards, shards within a node, and some in between."""
    found = {data, 1} if data <= 64 else {data}
    size = max(1, node // inside)
    while size < data:
        if data % size == 0:
            found.add(size)
        size *= 4
    return sorted(found)


def variants(config: Config, base: Parallel, schedules: Sequence[tuple[str, int]] = SCHEDULES) -> Iterator[Config]:
    """The free choices on given axes: schedule, recomputation, order of micro-batches, what stays gathered, micro-batch."""
    batch = config.train.global_batch_size // (base.dp_shard * base.dp_replicate)
    layers = config.model.num_layers
    choices: list[dict[str, object]] = [{}]
    if base.pp > 1:
        choices = [{"pp_schedule": n, "pp_virtual": v} for n, v in schedules if base.pp * (2 if n == "zbv" else v) <= layers]
    elif base.dp_shard * base.cp > 1:
        choices = [{}, {"reshard_after_forward": False}, {"accumulation": "layered"}]
        choices += [{"reshard_after_forward": 8}] if base.dp_shard * base.cp > 8 else []
    methods: list[dict[str, object]] = [{}, {"cp_method": "ulysses"}] if base.cp > 1 else [{}]
    for size in (1, 2, 4, 8):
        if size > batch or batch % size:
            continue
        train = config.train.model_copy(update={"micro_batch_size": size})
        for choice in choices:
            if "accumulation" in choice and size == batch:
                continue
            for method in methods:
                for mode in RECOMPUTE:
                    parallel = base.model_copy(update={**choice, **method, "recompute": mode})
                    yield config.model_copy(update={"parallel": parallel, "train": train})


def search(config: Config, ranks: int, cluster: Cluster, listed: int = LISTED) -> Found:
    """The fastest valid layouts that fit. Raises UsageError if the cluster is smaller than asked, or the model unknown to the planner."""
    if ranks > cluster.gpus:
        raise UsageError(f"--gpus is {ranks} but {cluster.name} has {cluster.gpus:,}: ask for at most as many, or raise the pool's nodes")
    links = Links(cluster, ranks)
    node = min(pool.gpus_per_node for pool in cluster.pools)
    fitting: list[tuple[float, float, int, Config, Prediction]] = []
    unfit: list[tuple[float, int, Config]] = []
    for number, changed in enumerate(c for base in axes(config, ranks, node) for c in variants(config, base)):
        setting = setting_of(changed, ranks, links.cpu)
        memory = peak_of(setting)
        needed = sum(memory.values())
        if needed > links.room:
            unfit.append((needed, number, changed))
        else:
            found = predict_setting(setting, links, memory)
            fitting.append((found.step_seconds, needed, number, changed, found))
    fitting.sort()
    unfit.sort()
    refused: dict[str, int] = {}
    layouts: list[Layout] = []
    pareto: list[Layout] = []
    least = float("inf")
    for _, needed, _, changed, found in fitting:
        if len(layouts) >= listed and needed >= least:
            continue
        checked = accepted(changed, ranks, refused)
        if checked is None:
            continue
        layout = Layout(checked, found)
        if len(layouts) < listed:
            layouts.append(layout)
        if needed < least:
            least = needed
            pareto.append(layout)
    nearest = None
    if not layouts:
        for _, _, changed in unfit:
            checked = accepted(changed, ranks, refused)
            if checked is not None:
                nearest = Layout(checked, predict_setting(setting_of(checked, ranks, links.cpu), links))
                break
    return Found(layouts, pareto, len(fitting) + len(unfit), len(unfit), refused, nearest)


def accepted(config: Config, ranks: int, refused: dict[str, int]) -> Config | None:
    """The config as the program would take it; None if a rule refuses it, which is counted by its sentence."""
    try:
        return check(config, ranks)
    except UsageError as error:
        sentence = str(error).splitlines()[-1].strip()
        refused[sentence] = refused.get(sentence, 0) + 1
        return None
