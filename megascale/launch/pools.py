"""Which nodes a job asks for, and where its ranks run. Each pool of equal nodes holds whole replicas, so that only gradient sums cross the
slow link between pools.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from megascale.config.schema import Parallel
from megascale.errors import UsageError

LARGEST = 4096  # most GPUs or ranks per node


@dataclass(frozen=True)
class Pool:
    """Nodes of one kind. `nodes`: "4", or "2-4" for as many as SLURM can allocate; gpus_per_node 0 means CPUs."""

    nodes: str
    gpus_per_node: int
    ranks_per_node: int
    partition: str | None = None
    constraint: str | None = None

    @property
    def least_ranks(self) -> int:
        return int(self.nodes.split("-")[0]) * self.ranks_per_node


def make_pool(nodes: str, gpus: int, ranks: int | None, partition: str | None = None, constraint: str | None = None) -> Pool:
    """Checks the values. Default for ranks: one per GPU, and one on a node without GPUs."""
    match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", nodes)
    if match is None or int(match[1]) < 1 or int(match[2] or match[1]) < int(match[1]):
        raise UsageError(f"--nodes is {nodes[:40]!r}: a number such as 4 or a range such as 2-4 is needed")
    if not 0 <= gpus <= LARGEST or (ranks is not None and not 1 <= ranks <= LARGEST):
        raise UsageError(f"{gpus} GPUs and {ranks} ranks on a node: GPUs from 0 (CPUs) to {LARGEST} and ranks from 1 on are needed")
    if ranks is not None and gpus and ranks > gpus:
        raise UsageError(
            f"--ranks-per-node is {ranks} but --gpus-per-node is {gpus}: every rank needs its own GPU; give at most {gpus} ranks"
        )
    return Pool(nodes, gpus, ranks or gpus or 1, partition, constraint)


def read_pool(text: str) -> Pool:
    """ "nodes=2,gpus=8,ranks=8,partition=a100,constraint=ib" → Pool."""
    values: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if not equals or key not in ("nodes", "gpus", "ranks", "partition", "constraint"):
            raise UsageError(
                f"--pool {text[:80]!r}: cannot use {item[:40]!r}; write nodes=N,gpus=G, and ranks=, partition=, constraint= as needed"
            )
        values[key] = value
    for key in ("nodes", "gpus"):
        if key not in values:
            raise UsageError(f"--pool {text[:80]!r}: {key}= is missing")
    for key in ("gpus", "ranks"):
        if not re.fullmatch("[0-9]{1,6}", values.get(key, "0")):
            raise UsageError(f"--pool {text[:80]!r}: {key} is {values[key][:40]!r}, but a whole number is needed")
    ranks = int(values["ranks"]) if "ranks" in values else None
    return make_pool(values["nodes"], int(values["gpus"]), ranks, values.get("partition"), values.get("constraint"))


def replicas_over_pools(pools: tuple[Pool, ...], parallel: Parallel) -> tuple[str, ...]:
    """Overrides that make every pool hold whole replicas: the largest that fit, unless the config fixes their size.

    Ranks are numbered pool by pool, and a replica is a block of dp_shard · cp · tp neighbouring ranks, so it lies in one pool exactly if
    that product divides every pool's ranks. Raises UsageError if that is impossible.
    """
    if len(pools) == 1:
        return ()
    for pool in pools:
        if "-" in pool.nodes:
            raise UsageError(f"a pool of {pool.nodes} nodes: give several pools fixed numbers, so that replicas can be assigned to them")
    ranks = [p.least_ranks for p in pools]
    inside, common = parallel.cp * parallel.tp, math.gcd(*ranks)
    words = " + ".join(map(str, ranks))
    if parallel.dp_shard == -1:
        if common % inside:
            raise UsageError(
                f"pools of {words} ranks, but parallel.tp {parallel.tp} × parallel.cp {parallel.cp} does not divide their common divisor "
                f"{common}: a replica would cross the link between pools; choose pools whose ranks are multiples of {inside}"
            )
        shard = common // inside
    else:
        shard = parallel.dp_shard
    replica = shard * inside
    if any(n % replica for n in ranks):
        raise UsageError(
            f"pools of {words} ranks, but a replica of parallel.dp_shard {shard} × tp {parallel.tp} × cp {parallel.cp} is {replica} ranks: "
            f"it would cross the link between pools; set parallel.dp_shard to -1, or to a divisor of {common // math.gcd(common, inside)}"
        )
    if sum(ranks) % (replica * parallel.pp):
        raise UsageError(f"{words} ranks are no multiple of parallel.pp {parallel.pp} × {replica} ranks of a replica: change parallel.pp")
    replicas = sum(ranks) // (replica * parallel.pp)
    if parallel.dp_replicate not in (1, replicas):
        raise UsageError(
            f"parallel.dp_replicate is {parallel.dp_replicate}, but pools of {words} ranks hold {replicas} replicas of {replica} ranks: "
            f"leave it out, or set it to {replicas}"
        )
    return (f"parallel.dp_replicate={replicas}", f"parallel.dp_shard={shard}")
