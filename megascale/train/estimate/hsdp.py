"""Recommends HSDP to runs whose shards lie on several nodes: gathers inside a node, and one sum between nodes per step."""

from __future__ import annotations

import torch

from megascale.config.layout import axis_sizes
from megascale.config.schema import Config
from megascale.config.support import refusals
from megascale.sizes import byte_words
from megascale.train.estimate.memory import needed
from megascale.train.estimate.oom_advice import ROOM

NODE = 8  # GPUs, if this machine has none


def hsdp_note(config: Config, ranks: int, limit: float | None, node: int | None = None) -> str | None:
    """A sentence with the smallest `dp_shard` that stays within nodes, or within as few as memory allows; None if nothing is to be gained.

    limit  bytes of a device; None: unknown
    """
    p, sizes = config.parallel, axis_sizes(config.parallel, ranks)
    node = node or torch.cuda.device_count() or NODE
    inside = sizes["tp"] * sizes["cp"]
    # Layered accumulation gathers once per step already, and so does a pipeline.
    plain = p.engine == "fsdp2" and p.accumulation == "depth_first" and p.pp == 1 and not p.offload
    if config.run.device == "cpu" or not plain or sizes["dp_replicate"] > 1 or inside * sizes["dp_shard"] <= node or node % inside:
        return None
    for nodes in range(1, sizes["dp_shard"] * inside // node):
        shard = nodes * node // inside
        if sizes["dp_shard"] % shard:
            continue
        changed = p.model_copy(update={"dp_shard": shard, "dp_replicate": sizes["dp_shard"] // shard})
        other = config.model_copy(update={"parallel": changed})
        need = sum(needed(other, ranks))
        if (limit is None or need < ROOM * limit) and not refusals(other, ranks):
            within = "a node" if nodes == 1 else f"{nodes} nodes"
            return (
                f"weights are sharded over {sizes['dp_shard'] * sizes['cp']} ranks on {-(-sizes['dp_shard'] * inside // node)} nodes of "
                f"{node} GPUs, so every micro-batch gathers them between nodes; parallel.dp_shard={shard} "
                f"parallel.dp_replicate={changed.dp_replicate} (HSDP) gathers within {within} and sums "
                f"gradients between replicas once per step, for {byte_words(need)} per rank"
            )
    return None
