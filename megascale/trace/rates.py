"""Seconds of an operation and of an exchange on a cluster: roofline and α–β, pure arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megascale.errors import UsageError
from megascale.planning.cluster import Cluster, Device, Link

VIEW = 1.5e-6  # seconds of the host for an operation that launches nothing
CALL = 30e-6  # seconds of the host to start a collective


def product_rate(device: Device, factors: str, flops: float) -> float:
    """FLOP/s of products that are limited by computing. `factors`: a number format, "attention", or "grouped" products in bf16."""
    if factors == "attention":
        return device.peak("bf16") * device.attention_share
    return device.product_rate("bf16" if factors == "grouped" else factors, flops)


def operation_seconds(device: Device, flops: float, moved: float, factors: str) -> float:
    """The roofline: whichever takes longer, computing or moving bytes, at the speed that kernels have within whole steps."""
    computing = flops / product_rate(device, factors, flops) if flops else 0.0
    return max(computing, moved / device.memory_bytes_per_second, device.kernel_seconds) / device.step_share


def exchange_seconds(cluster: Cluster, operation: str, ranks: Sequence[int], size: int) -> float:
    """An exchange between `ranks` of a tensor that has `size` bytes as a whole; a message is between two. Ring algorithm, and a tree for
    small all-reduces.
    """
    count = len(ranks)
    if count == 1:
        return 0.0
    link, share = cluster.joins(ranks)
    nodes = Counter(cluster.node_of(rank) for rank in ranks)
    if operation in ("send", "recv"):
        return link.seconds(size)
    hops = link.latency_seconds * (len(nodes) - 1) + cluster.pools[0].inside.latency_seconds * (count - len(nodes))
    moving = size * (count - 1) / count
    if operation == "all_reduce":
        return min(2 * hops, 60e-6 + hops / 5) + 2 * _moving(link, moving, share)
    if operation == "all_to_all" and len(nodes) > 1:
        return hops + _moving(link, size * (1 - min(nodes.values()) / count), 1.0)  # each rank uses its own way out of the node
    return hops + _moving(link, moving, share)


def _moving(link: Link, size: float, share: float) -> float:
    return max(0.0, link.seconds(size, share) - link.latency_seconds)


def check_size(cluster: Cluster, ranks: int) -> None:
    if ranks > cluster.gpus:
        raise UsageError(f"the run has {ranks} ranks but the cluster {cluster.name} has {cluster.gpus} devices: add nodes to its file")
