"""A cluster as plain data: devices, links, prices and failure rates, read from a YAML file. Imports no torch.

A file has one pool of equal nodes, or several pools with a link between them. Every number is what programs reach, with its source in a
comment of the file, not what a data sheet promises; peaks alone are the data sheet's, for MFU.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from megascale.config.load import read_yaml
from megascale.config.schema.section import Section
from megascale.errors import UsageError

Rate = Annotated[float, Field(gt=0, le=1e21)]
Part = Annotated[float, Field(gt=0, le=1)]
Amount = Annotated[float, Field(ge=0, le=1e21)]
Count = Annotated[int, Field(ge=1, le=2**20)]
DType = Literal["fp8", "bf16", "fp32", "fp64"]


def check_ascending(table: Sequence[tuple[float, float]], name: str) -> None:
    """Raises ValueError for sizes out of order, between which nothing could be read."""
    for (before, _), (size, _) in pairwise(table):
        if size <= before:
            raise ValueError(f"{name} has the size {size:g} after {before:g}: sizes must ascend, each once")


class Link(Section):
    """What one rank sends over a kind of link."""

    bytes_per_second: Rate
    """Bytes per second that one rank sends in one direction, of large messages."""
    latency_seconds: Amount = 0.0
    """Seconds that a message takes beyond its bytes."""
    table: tuple[tuple[Rate, Rate], ...] = ()
    """Measured rates by size: pairs of a message's bytes and its bytes per second, sizes ascending. They replace the two numbers above."""

    @model_validator(mode="after")
    def _sorted(self) -> Link:
        check_ascending(self.table, "table")
        return self

    def seconds(self, size: float, share: float = 1.0, messages: int = 1) -> float:
        """Time of `size` bytes in `messages` equal parts, one after the other. `share`: factor on the bandwidth."""
        if size <= 0:
            return 0.0
        if not self.table:
            return messages * self.latency_seconds + size / (share * self.bytes_per_second)
        return messages * self._measured(size / messages) / share

    def _measured(self, size: float) -> float:
        """Seconds of one message: between two measured sizes on the straight line of their times, above them at the last rate, below them
        the first time.
        """
        times = [(s, s / rate) for s, rate in self.table]
        i = bisect_right([s for s, _ in times], size)
        if i == len(times):
            return size / self.table[-1][1]
        if i == 0:
            return times[0][1]
        (a, s), (b, t) = times[i - 1], times[i]
        return s + (t - s) * (size - a) / (b - a)


class Device(Section):
    """One GPU, or one rank's share of a CPU."""

    name: Annotated[str, Field(max_length=100)]
    """Name as the driver gives it, such as NVIDIA H100 80GB HBM3."""
    kind: Literal["cuda", "cpu"] = "cuda"
    """What PyTorch calls it."""
    memory_bytes: Rate
    """Bytes of memory."""
    reserve_bytes: Amount = 3e9
    """Bytes of it that tensors cannot have: context, NCCL buffers, workspaces, fragments of the allocator."""
    peak_flops: dict[DType, Rate]
    """Peak FLOP/s of dense products by number format, from the data sheet. MFU is a share of it."""
    product_share: Part
    """Share of the peak that large products reach."""
    product_share_of: dict[DType, Part] = Field(default_factory=dict)
    """The same for number formats in which it differs."""
    attention_share: Part
    """Share of the peak that fused attention reaches, forward and backward together."""
    step_share: Part = 1.0
    """Speed of kernels within whole steps, as a share of their speed when measured one by one: clocks under load, gaps between kernels."""
    product_table: tuple[tuple[Rate, Rate], ...] = ()
    """Measured products by size: pairs of FLOPs in one product and FLOP/s, sizes ascending, in the number format that ran. They replace
    `product_share` for smaller products.
    """
    memory_bytes_per_second: Rate
    """Bytes per second that compiled elementwise kernels read and write."""
    kernel_seconds: Amount = 2e-6
    """Shortest time of a kernel on the device."""
    launch_seconds: Amount = 5e-6
    """Time of the host to launch one kernel."""

    @model_validator(mode="after")
    def _room(self) -> Device:
        check_ascending(self.product_table, "product_table")
        if self.reserve_bytes >= self.memory_bytes:
            raise ValueError(f"reserve_bytes is {self.reserve_bytes:g} but memory_bytes is {self.memory_bytes:g}: nothing is left")
        return self

    @property
    def room(self) -> float:
        """Bytes that tensors may have."""
        return self.memory_bytes - self.reserve_bytes

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s in a format. Raises UsageError if the file does not have it."""
        for name, rate in self.peak_flops.items():
            if name == dtype:
                return rate
        raise UsageError(f"the cluster's device {self.name} has no peak_flops.{dtype}: add it, or choose another precision.compute")

    def product_rate(self, dtype: str, flops: float = float("inf")) -> float:
        """FLOP/s of a product with so many FLOPs: measured if the table has such sizes, else the share of the peak."""
        if self.product_table:
            i = bisect_right([size for size, _ in self.product_table], flops)
            if i < len(self.product_table):
                (b, fast), (a, slow) = self.product_table[i], self.product_table[max(0, i - 1)]
                return fast if a == b else slow + (fast - slow) * (flops - a) / (b - a)
        share = {str(name): part for name, part in self.product_share_of.items()}.get(dtype, self.product_share)
        return share * self.peak(dtype)


class Pool(Section):
    """Equal nodes."""

    name: Annotated[str, Field(max_length=100)] = "pool"
    """Name in messages."""
    nodes: Count
    """Number of nodes."""
    gpus_per_node: Count
    """Devices of a node, one rank each."""
    device: Device
    """The device."""
    inside: Link
    """The link between devices of a node, per device: NVLink, or memory."""
    between: Link
    """The network between nodes, per device: its NIC, or its share of the node's."""
    dollars_per_gpu_hour: Amount = 0.0
    """Price of a device for an hour, its part of the node included."""
    watts_per_gpu: Amount = 0.0
    """Power of a device under load, its part of the node and of cooling included."""
    failures_per_gpu_hour: Amount = 0.0
    """Failures that stop a job, per device and hour."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


class Cluster(Section):
    """Pools in the order in which ranks are numbered, and what they share."""

    name: Annotated[str, Field(max_length=100)]
    """Name in reports."""
    pools: Annotated[tuple[Pool, ...], Field(min_length=1, max_length=64)]
    """Pools of equal nodes."""
    between_pools: Link | None = None
    """The link between pools, per device; needed with several pools."""
    checkpoint_bytes_per_second: Rate = 10e9
    """Bytes per second that all ranks together write to the file system of checkpoints."""
    restart_seconds: Amount = 300.0
    """Seconds from a failure to the first step of the next attempt: noticing, queueing, starting, loading."""

    @model_validator(mode="after")
    def _joined(self) -> Cluster:
        if len(self.pools) > 1 and self.between_pools is None:
            raise ValueError(f"there are {len(self.pools)} pools: between_pools must describe the link between them")
        return self

    @property
    def gpus(self) -> int:
        return sum(pool.gpus for pool in self.pools)

    def devices(self, ranks: int) -> list[Device]:
        """Devices of the pools that the first `ranks` ranks use."""
        used, left = [], ranks
        for pool in self.pools:
            if left > 0:
                used.append(pool.device)
            left -= pool.gpus
        return used

    def node_of(self, rank: int) -> tuple[int, int]:
        """(pool, node within it) of a rank. Raises IndexError beyond the last one."""
        for i, pool in enumerate(self.pools):
            if rank < pool.gpus:
                return i, rank // pool.gpus_per_node
            rank -= pool.gpus
        raise IndexError(f"rank {rank} beyond {self.gpus} devices")

    def joins(self, ranks: Sequence[int]) -> tuple[Link, float]:
        """The slowest kind of link that a ring over these ranks uses, and how many devices' links share the ring's traffic there.

        Where a ring leaves a node, its ranks there share the traffic, each with its own NIC; it is never faster than the link inside.
        """
        places = [self.node_of(rank) for rank in ranks]
        nodes = Counter(places)
        first = self.pools[places[0][0]]
        if len(nodes) == 1:
            return first.inside, 1.0
        least = float(min(nodes.values()))
        if len({pool for pool, _ in nodes}) > 1:
            assert self.between_pools is not None
            link = self.between_pools
        else:
            link = first.between
        return link, min(least, max(1.0, first.inside.bytes_per_second / link.bytes_per_second))


def load_cluster(path: str | Path) -> Cluster:
    """Reads a cluster file. Raises UsageError naming the file, the key and what is wrong."""
    values = read_yaml(Path(path), "cluster file")
    try:
        return Cluster.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise UsageError("\n  ".join([f"the cluster file {path} cannot be used:", *lines[:20]])) from None
