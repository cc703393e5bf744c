"""Time of a step: computation, bubble, and the exchanges that computation does not hide.

On GPUs gathers and reductions of weights run beside computation, as FSDP2 issues them: a layer's gather while the layer before computes, a
layer's reduction while the next one computes. Exchanges of activations stop computation. On CPUs both share the cores, so nothing is
hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from megascale.config.schema import Config
from megascale.planning.cluster import Cluster, Device, Link
from megascale.planning.layer import flops_per_step, layer_seconds, loss_seconds, update_seconds
from megascale.planning.memory import held, peak_of
from megascale.planning.pipeline import idle_units
from megascale.planning.setting import Setting, setting_of
from megascale.planning.traffic import (
    context_passes,
    expert_passes,
    gather_bytes,
    gathers,
    others,
    reduce_bytes,
    replica_bytes,
    sent_bytes,
    tensor_passes,
)
from megascale.planning.weights import Unit


@dataclass(frozen=True)
class Prediction:
    """What a step of a config on a cluster takes.

    parts   seconds of the step by what they are spent on: compute, recompute, bubble, update, and each axis' exposed exchanges
    memory  bytes by kind at the peak of the fullest rank; `room` is what a device offers
    sent    bytes by axis, of the rank that sends most
    """

    step_seconds: float
    parts: dict[str, float]
    bubble: float
    mfu: float
    tokens_per_second: float
    flops_per_step: float
    memory: dict[str, float]
    room: float
    sent: dict[str, float]

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())


@dataclass
class Links:
    """The link that each axis of a layout uses, on the first ranks of a cluster."""

    cluster: Cluster
    ranks: int
    _found: dict[tuple[int, int], tuple[Link, float]] = field(default_factory=dict)

    @cached_property
    def devices(self) -> list[Device]:
        """Devices of the pools in use."""
        return self.cluster.devices(self.ranks)

    @property
    def room(self) -> float:
        """Bytes that every rank may use."""
        return min(device.room for device in self.devices)

    @property
    def cpu(self) -> bool:
        return any(device.kind == "cpu" for device in self.devices)

    def of(self, size: int, stride: int) -> tuple[Link, float]:
        """The slowest link of a ring over `size` ranks that are `stride` apart, and the share of it that the ring has."""
        if (size, stride) not in self._found:
            span = size * stride
            starts = {0, max(0, self.ranks - span)}
            place = 0
            for pool in self.cluster.pools[:-1]:  # groups across the border between two pools
                place += pool.gpus
                if place < self.ranks:
                    starts.add((place - 1) // span * span)
            rings = [self.cluster.joins(range(start, start + span, stride)) for start in starts]
            self._found[size, stride] = max(rings, key=lambda ring: ring[0].seconds(1e8, ring[1]))
        return self._found[size, stride]

    def seconds(self, size: float, ranks: int, stride: int) -> float:
        """Time of an exchange in which a rank sends `size` bytes in ranks − 1 steps of a ring."""
        if size <= 0 or ranks == 1:
            return 0.0
        link, share = self.of(ranks, stride)
        return link.seconds(size, share, ranks - 1)


def predict(config: Config, ranks: int, cluster: Cluster, links: Links | None = None) -> Prediction:
    """Memory, traffic and time of a checked config on the first `ranks` devices of a cluster."""
    links = links or Links(cluster, ranks)
    return predict_setting(setting_of(config, ranks, links.cpu), links)


def predict_setting(s: Setting, links: Links, memory: dict[str, float] | None = None) -> Prediction:
    """The same for a config taken apart, whose `memory` may be known already."""
    timed = [Step(s, links, device).run() for device in links.devices]  # every rank waits for the slowest pool
    parts, bubble = max(timed, key=lambda found: sum(found[0].values()))
    seconds = sum(parts.values())
    flops, train = flops_per_step(s), s.config.train
    peak = sum(d.peak(s.config.precision.compute) for d in links.devices) / len(links.devices)
    tokens = train.global_batch_size * train.seq_len / seconds
    return Prediction(
        seconds,
        parts,
        bubble,
        flops / (s.ranks * peak * seconds),
        tokens,
        flops,
        peak_of(s) if memory is None else memory,
        links.room,
        sent_bytes(s),
    )


@dataclass(frozen=True)
class LayerTime:
    """One kind of layer: computation of a micro-batch with the exchanges that stop it; gathers forward and backward; reduction; sum over
    replicas.
    """

    forward: float
    backward: float
    again: float
    waits: dict[str, tuple[float, float]]  # by axis: forward, backward with recomputation
    gather: float
    gather_again: float
    reduce: float
    replicas: float
    kernels: float

    @property
    def forward_all(self) -> float:
        return self.forward + sum(f for f, _ in self.waits.values())

    @property
    def backward_all(self) -> float:
        return self.backward + self.again + sum(b for _, b in self.waits.values())


class Step:
    """The time of a step on one kind of device."""

    def __init__(self, s: Setting, links: Links, device: Device) -> None:
        self.s, self.links, self.device = s, links, device
        self.overlaps = device.kind == "cuda"
        sizes, p = s.sizes, s.config.parallel
        self.shard_stride, self.replica_stride = p.tp, p.tp * sizes["cp"] * sizes["dp_shard"]
        etp = s.config.parallel.expert_tp if s.config.model.moe else 1
        self.ep_stride, self.edp_stride = etp, etp * sizes["ep"]
        self._layers: dict[Unit, LayerTime] = {}

    def run(self) -> tuple[dict[str, float], float]:
        """Seconds by part, and the share of the step in which the pipeline waits."""
        parts, bubble = max((self._rank(r) for r in self.s.distinct), key=lambda found: sum(found[0].values()))
        return {name: seconds for name, seconds in parts.items() if seconds > 0}, bubble

    def layer(self, unit: Unit) -> LayerTime:
        if unit not in self._layers:
            self._layers[unit] = self._layer(unit)
        return self._layers[unit]

    def _layer(self, unit: Unit) -> LayerTime:
        s, p = self.s, self.s.config.parallel
        own = layer_seconds(s, unit, self.device)
        waits = {}
        ring = self._ring_wait(unit)
        for axis, passes, ranks, stride in (
            ("tp", tensor_passes(s, unit), p.tp, 1),
            ("cp", context_passes(s, unit), p.cp, p.tp),
            ("ep", expert_passes(s, unit), s.cuts.ep, self.ep_stride),
        ):
            if not passes.total:
                continue
            forward = self._messages(axis, passes.forward, ranks, stride)
            backward = self._messages(axis, passes.backward + passes.again, ranks, stride)
            if axis == "cp" and self.overlaps and p.heads_over == 1:
                forward, backward = max(0.0, forward - ring), max(0.0, backward - 2 * ring)
            waits[axis] = (forward, backward)
        far, near = gathers(s, unit)
        gather = self._sharded(unit, gather_bytes)
        again = gather if far > s.micro_batches or (p.accumulation == "layered" and far > 1) else 0.0
        if near and not isinstance(p.reshard_after_forward, bool):
            n = p.reshard_after_forward
            again = self.links.seconds(gather_bytes(s, unit, False, n), n, self.shard_stride)
        shards = s.sizes["dp_replicate"]
        replicas = self.links.seconds(replica_bytes(s, unit, False) + replica_bytes(s, unit, True), shards, self.replica_stride)
        if p.engine == "ddp":
            copies = s.sizes["dp_replicate"] * s.sizes["cp"]
            size = 2 * others(copies) * held(unit, s.cuts).kept * s.stored
            replicas = self.links.seconds(size, copies, p.tp)
        reduce = self._sharded(unit, reduce_bytes)
        return LayerTime(own.forward, own.backward, own.again, waits, gather, again, reduce, replicas, own.kernels)

    def _ring_wait(self, unit: Unit) -> float:
        """Time of attention, beside which a ring's blocks travel."""
        from megascale.planning.layer import attention_flops

        return attention_flops(self.s, unit) / (self.device.attention_share * self.device.peak(self.s.config.precision.compute))

    def _messages(self, axis: str, size: float, ranks: int, stride: int) -> float:
        """Exchanges of a layer and pass: four over tp, two to four elsewhere, each a ring of its own."""
        return sum(self.links.seconds(size / 4, ranks, stride) for _ in range(4))

    def _sharded(self, unit: Unit, size: Callable[[Setting, Unit, bool], float]) -> float:
        if not self.s.sharded:
            return 0.0
        dense = self.links.seconds(size(self.s, unit, False), self.s.cuts.shard, self.shard_stride)
        return dense + self.links.seconds(size(self.s, unit, True), self.s.cuts.edp, self.edp_stride)

    def _beside(self, compute: float, exchange: float) -> float:
        """Time that an exchange adds to the computation beside which it runs."""
        return max(0.0, exchange - compute) if self.overlaps else exchange

    def _rank(self, rank: int) -> tuple[dict[str, float], float]:
        s, p, m = self.s, self.s.config.parallel, self.s.micro_batches
        stages = s.stages[rank]
        layers = [(self.layer(unit), n) for unit, n in s.layers_of(stages)]
        ends = [self.layer_of_end(unit) for unit in s.ends_of(stages)]
        last = any(part.last for part in stages)
        loss = loss_seconds(s, self.device) if last else 0.0
        parts = {
            "compute": m * (sum(n * (t.forward + t.backward) for t, n in layers) + loss),
            "recompute": m * sum(n * t.again for t, n in layers),
            "update": update_seconds(s, s.stored_of(stages), self.device),
        }
        for axis in ("tp", "cp", "ep"):
            parts[axis] = m * sum(n * sum(t.waits.get(axis, (0.0, 0.0))) for t, n in layers)
        parts["tp"] += m * self._end_exchanges(stages[0].first, last)
        host = m * sum(n * t.kernels for t, n in layers) * self.device.launch_seconds
        parts["launch"] = max(0.0, host - sum(parts.values()))
        bubble = 0.0
        if p.pp > 1:
            waits, bubble = self._pipeline(rank, sum(parts.values()) - parts["update"], layers, ends)
            parts |= waits
        else:
            parts["dp"] = self._sharding(layers, ends)
        parts["dp"] = parts.get("dp", 0.0) + self._replicas(layers, ends)
        return parts, bubble

    def layer_of_end(self, unit: Unit) -> LayerTime:
        """Exchanges of the embedding's or the head's weights."""
        if unit not in self._layers:
            s, p = self.s, self.s.config.parallel
            gather, reduce = self._sharded(unit, gather_bytes), self._sharded(unit, reduce_bytes)
            replicas = self.links.seconds(replica_bytes(s, unit, False), s.sizes["dp_replicate"], self.replica_stride)
            if p.engine == "ddp":
                copies = s.sizes["dp_replicate"] * s.sizes["cp"]
                size = 2 * others(copies) * held(unit, s.cuts).kept * s.stored
                replicas = self.links.seconds(size, copies, p.tp)
            self._layers[unit] = LayerTime(0.0, 0.0, 0.0, {}, gather, 0.0, reduce, replicas, 0.0)
        return self._layers[unit]

    def _end_exchanges(self, first: bool, last: bool) -> float:
        """Exchanges over tp at the embedding, at the head and in the loss, of one micro-batch."""
        s, n = self.s, self.s.config.parallel.tp
        if n == 1:
            return 0.0
        end = 2 * others(n) * s.tokens() * s.config.model.hidden_size * s.item
        sums = 2 * others(n) * 3 * s.tokens() * max(4, s.item)
        return (first + last) * self.links.seconds(end, n, 1) + (2 * self.links.seconds(sums / 2, n, 1) if last else 0.0)

    def _sharding(self, layers: list[tuple[LayerTime, int]], ends: list[LayerTime]) -> float:
        """Exposed gathers and reductions of a step without a pipeline."""
        p, m = self.s.config.parallel, self.s.micro_batches
        together = (p.breadth_first or m) if p.accumulation == "layered" else 1
        exposed = 0.0
        for t, n in layers:
            exposed += n * self._beside(together * t.forward_all, t.gather)
            exposed += n * self._beside(together * t.backward_all, t.gather_again + t.reduce)
        # The first layer's weights and the embedding's come before anything can be computed.
        exposed += sum(t.gather for t in ends) + (layers[0][0].gather if layers and self.overlaps else 0.0)
        once = sum(t.reduce for t in ends) + (layers[0][0].reduce if layers and self.overlaps else 0.0)
        return (m // together) * (exposed + (0.0 if self.overlaps else once)) + (once if self.overlaps else 0.0)

    def _replicas(self, layers: list[tuple[LayerTime, int]], ends: list[LayerTime]) -> float:
        """Sums over replicas, once a step beside the last backward; the last one beside nothing."""
        total = sum(n * t.replicas for t, n in layers) + sum(t.replicas for t in ends)
        if not total or not self.overlaps:
            return total
        free = sum(n * max(0.0, t.backward_all - t.gather_again - t.reduce) for t, n in layers)
        return max(0.0, total - free) + sum(t.replicas for t in ends)

    def _pipeline(
        self, rank: int, work: float, layers: list[tuple[LayerTime, int]], ends: list[LayerTime]
    ) -> tuple[dict[str, float], float]:
        """Bubble, messages between stages, and exposed exchanges of weights, which happen once a step."""
        s, p, m = self.s, self.s.config.parallel, self.s.micro_batches
        stages = p.stages_per_rank
        unit = work / (m * stages * 3)  # a third of a stage's forward and backward
        bubble = unit * idle_units(p.pp_schedule, p.pp, stages, m)
        message = s.message * s.config.model.hidden_size * s.item
        link, share = self.links.of(p.pp, s.ranks // p.pp)
        each = link.seconds(message, share)
        # While the pipeline fills and drains a message is waited for at every border; later only its latency.
        hops = 2 * (p.pp - 1) * each + 2 * m * stages * (link.seconds(1.0) if self.overlaps else each)
        exchanged = sum(n * (t.gather + t.reduce) for t, n in layers) + sum(t.gather + t.reduce for t in ends)
        parts = {"bubble": bubble, "pp": hops, "dp": exchanged / (stages if self.overlaps else 1)}
        return parts, bubble / (work + bubble) if work else 0.0
