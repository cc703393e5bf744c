"""One rank traced on the fake device: the step's facts as plain data. In a process of its own, since the device changes torch for good."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megascale.analysis.fake_device import BACKEND, FakeDevice, FakeStream
from megascale.analysis.host_syncs import host_syncs
from megascale.config.schema import Config
from megascale.parallel.model import ParallelModel
from megascale.planning.cluster import Cluster
from megascale.trace import fakes, group, rates
from megascale.trace.gpu import choose_as_cuda
from megascale.trace.memory import Memory, follow_resizing
from megascale.trace.meter import Meter
from megascale.trace.operations import Work
from megascale.trace.step import actions_timed, run_steps
from megascale.train.build import place_model

SEPARATOR = " | "  # in the name of a line of memory: kind, operation, place


@dataclass
class Trace:
    """A traced rank: its meter, its exchanges, and what is not in them."""

    model: ParallelModel
    meter: Meter
    calls: group.Calls
    sent: dict[str, int]
    syncs: dict[str, int]
    actions: dict[str, dict[str, float]]
    seconds: float  # of the rank, of its host, of its main stream's waits and of its host's waits
    host_seconds: float
    exposed_seconds: float
    stalled_seconds: float
    begun: float


class Machine:
    """The fake device, prepared once a process."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.device_facts = cluster, cluster.pools[0].device  # those of the rank that is traced
        self.fake = FakeDevice()
        torch.autograd.set_multithreading_enabled(False)
        choose_as_cuda()
        fakes.open_operators()
        fakes.without_values(self.fake.mode)
        self._seconds: dict[tuple[str, tuple[int, ...], int], float] = {}

    @property
    def device(self) -> torch.device:
        return self.fake.device

    def kernel(self, work: Work) -> tuple[int, float, float]:
        """Queues a kernel on the current stream."""
        facts = self.device_facts
        seconds = rates.operation_seconds(facts, work.flops, work.moved, work.factors) + (work.kernels - 1) * facts.kernel_seconds
        BACKEND.host += facts.launch_seconds * work.kernels
        stream = BACKEND.current
        return stream.stream_id, stream.run(seconds), seconds

    def view(self) -> None:
        BACKEND.host += rates.VIEW

    def exchange(self, operation: str, ranks: Sequence[int], size: int, free: float) -> tuple[float, float]:
        """Queues an exchange behind the current stream's work and the communicator's."""
        BACKEND.host += rates.CALL
        key = operation, tuple(ranks), size
        if key not in self._seconds:
            self._seconds[key] = rates.exchange_seconds(self.cluster, operation, ranks, size)
        start = max(BACKEND.host, BACKEND.current.ready, free)
        return start, start + self._seconds[key]

    def wait(self, end: float) -> None:
        BACKEND.current.wait_until(end)

    def host_waits(self) -> None:
        BACKEND.wait_until(BACKEND.current.ready)

    def integers(self, shape: tuple[int, ...], vocabulary: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device=self.device)


def trace_rank(machine: Machine, config: Config, ranks: int, rank: int, micro_batches: int) -> Trace:
    """A step as `rank` of `ranks`; of a pipeline the second, since torch's runtime tries its links before the first."""
    device, steps = machine.device, 2 if config.parallel.pp > 1 else 1
    machine.device_facts = machine.cluster.pools[machine.cluster.node_of(rank)[0]].device
    calls = group.Calls(frozenset((device.type,)), group.Timed(machine.exchange, machine.wait))
    if ranks > 1:
        group.start(rank, ranks, calls)
    BACKEND.host = BACKEND.stalled = 0.0
    BACKEND.default = BACKEND.current = FakeStream()

    def now() -> float:
        return max(BACKEND.host, BACKEND.default.ready)

    memory = Memory(now)
    stop = follow_resizing(memory)
    begun: dict[str, float] = {}

    def at_step() -> None:
        BACKEND.host = BACKEND.default.ready = max(BACKEND.host, BACKEND.default.ready)
        begun.update(time=BACKEND.host, waited=BACKEND.default.waited, stalled=BACKEND.stalled)
        calls.log.clear()
        BACKEND.waits.clear()
        syncs.clear()
        actions.clear()
        memory.restart("forward")

    try:
        model = place_model(config, ranks, device)
        meter = Meter(device.type, memory, machine.kernel, machine.view)
        with host_syncs(device.type, machine.host_waits) as syncs, actions_timed(now) as actions:
            sent = run_steps(config, model, device, machine.integers, micro_batches, steps, meter, at_step)
    finally:
        stop()
        if ranks > 1:
            dist.destroy_process_group()
    waits = {f"{s.kind}: {s.where}": n for s, n in syncs.items()}
    end = max(BACKEND.host, BACKEND.default.ready, *(k.start + k.seconds for k in meter.kernels))
    passed = end - begun["time"], BACKEND.host - begun["time"], BACKEND.default.waited - begun["waited"], BACKEND.stalled - begun["stalled"]
    return Trace(model, meter, calls, sent, waits, actions, *passed, begun["time"])


def facts_of(trace: Trace, device_type: str) -> dict[str, Any]:
    """What is reported about a traced rank, as numbers by name, nested: facts of smaller runs are extended linearly (reduced.py)."""
    memory, calls, counts = trace.meter.memory, trace.calls, trace.meter.counts
    names = {axis.group: axis.name for axis in trace.model.mesh.axes.values() if axis.group is not None}
    exchanges: dict[str, dict[str, float]] = defaultdict(lambda: {"calls": 0, "bytes": 0, "sent_bytes": 0, "seconds": 0.0})
    for call in calls.log:
        row = exchanges[f"{names.get(call.group, 'all ranks')} {call.operation} {call.group.count}"]
        row["calls"] += 1
        row["bytes"] += call.size
        row["sent_bytes"] += call.sent
        row["seconds"] += call.end - call.start
    return {
        "host_bytes": memory.peak("cpu").total,
        "sent_bytes": trace.sent,
        "exchanges": exchanges,
        "host_syncs": trace.syncs,
        "wrong_device": {f"{name}: {line}": n for (name, line), n in counts.wrong.items()}
        | {f"{c.operation}: {c.line}": 1 for c in calls.wrong},
        "actions": trace.actions,
        "kernels": sum(counts.kernels.values()),
        "kernels_by_operation": dict(counts.kernels),
        "flops": float(sum(counts.flops.values())),
        "busy_seconds": float(sum(counts.seconds.values())),
        "rank_seconds": trace.seconds,
        "host_seconds": trace.host_seconds,
        "exposed_seconds": trace.exposed_seconds,
        "stalled_seconds": trace.stalled_seconds,
    }


def peak_at(trace: Trace, device_type: str, place: str) -> dict[str, Any]:
    """The most memory at one of `peaks`, by kind and by line."""
    memory = trace.meter.memory
    peak = memory.at(device_type, memory.peaks(device_type)[place][1])
    return {"peak_bytes": peak.by_kind, "peak_lines": {SEPARATOR.join(key): n for key, n in peak.by_line.items()}}
