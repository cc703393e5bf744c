"""A traced step drawn: memory over time by kind as a PNG, and all that ran in the format that Perfetto and Chrome open."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megascale.trace.memory_kinds import KINDS
from megascale.trace.rank import Trace

COLORS = ("#4c78a8", "#72b7b2", "#54a24b", "#eeca3b", "#b279a2", "#f58518", "#e45756", "#9d755d")
POINTS = 2000  # of a curve, each the highest within its share of the step


def draw_memory(trace: Trace, device_type: str, path: Path) -> None:
    """Bytes by kind over the step, stacked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve = _thinned(trace.meter.memory.curve(device_type))
    times = [1e3 * (time - trace.begun) for time, _ in curve]
    kinds = [kind for kind in KINDS if any(now.get(kind) for _, now in curve)]
    figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
    axes.stackplot(
        times, *[[now.get(k, 0) / 1e9 for _, now in curve] for k in kinds], labels=kinds, colors=[COLORS[KINDS.index(k)] for k in kinds]
    )
    totals = [sum(now.values()) / 1e9 for _, now in curve]
    most = max(range(len(curve)), key=lambda i: totals[i])
    axes.annotate(
        f"{totals[most]:.2f} GB",
        (times[most], totals[most]),
        textcoords="offset points",
        xytext=(0, 6),
        ha="center",
    )
    axes.set(xlabel="model time (ms)", ylabel="GB", xlim=(min(times), max(times)), ylim=(0, 1.12 * max(totals)))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, reverse=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _thinned(curve: list[tuple[float, dict[str, int]]]) -> list[tuple[float, dict[str, int]]]:
    """At most POINTS of a curve of bytes by kind: the highest within each share of it."""
    totals = np.array([sum(now.values()) for _, now in curve])
    parts = np.array_split(np.arange(len(curve)), min(POINTS, len(curve)))
    return [curve[int(part[0] + totals[part].argmax())] for part in parts]


def write_chrome(trace: Trace, device_type: str, path: Path) -> None:
    """Kernels by stream, exchanges by axis, memory as a counter; microseconds."""
    names = {axis.group: axis.name for axis in trace.model.mesh.axes.values() if axis.group is not None}
    streams = sorted({kernel.stream for kernel in trace.meter.kernels})
    events = [
        {
            "name": k.name,
            "ph": "X",
            "pid": "device",
            "tid": f"stream {streams.index(k.stream)}",
            "ts": 1e6 * (k.start - trace.begun),
            "dur": 1e6 * k.seconds,
            "args": {"line": k.line},
        }
        for k in trace.meter.kernels
    ]
    events += [
        {
            "name": call.operation,
            "ph": "X",
            "pid": "exchanges",
            "tid": names.get(call.group, "all ranks"),
            "ts": 1e6 * (call.start - trace.begun),
            "dur": 1e6 * (call.end - call.start),
            "args": {"bytes": call.size, "line": call.line},
        }
        for call in trace.calls.log
    ]
    events += [
        {"name": "memory (GB)", "ph": "C", "pid": "memory", "ts": 1e6 * (time - trace.begun), "args": {k: n / 1e9 for k, n in now.items()}}
        for time, now in _thinned(trace.meter.memory.curve(device_type))
    ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
