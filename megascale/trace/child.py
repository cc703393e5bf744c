"""The process that traces: `python -m megascale.trace.child REQUEST ANSWER`, two JSON files. Its device changes torch for good."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # they import torch
    from megascale.trace.rank import Machine, Trace
    from megascale.trace.reduced import Run


def main(request: str, answer: str) -> None:
    from megascale.config.load import build_config
    from megascale.config.support import check
    from megascale.planning.cluster import Cluster
    from megascale.trace.picture import draw_memory, write_chrome
    from megascale.trace.rank import Machine
    from megascale.trace.reduced import runs_of

    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    ranks = asked["ranks"]
    config = check(build_config(asked["config"]), ranks)
    machine = Machine(Cluster.model_validate(asked["cluster"]))
    found: dict[str, Any] = {}
    runs = runs_of(config, ranks)
    for rank in asked["of"]:
        facts, largest = traced_rank(machine, runs, ranks, rank)
        if not found and asked["chrome"]:
            write_chrome(largest, machine.device.type, Path(asked["chrome"]))
            draw_memory(largest, machine.device.type, Path(asked["picture"]))
        found[str(rank)] = facts
    result = {
        "ranks": found,
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


def traced_rank(machine: Machine, runs: Sequence[Run], ranks: int, rank: int) -> tuple[dict[str, Any], Trace]:
    """The sum of the runs' facts, with memory at the place that is highest in it, and the trace of the last and largest run."""
    from megascale.trace.rank import facts_of, peak_at, trace_rank
    from megascale.trace.reduced import combined

    begun, kind = time.process_time(), machine.device.type
    traces = [trace_rank(machine, run.config, ranks, rank, run.micro_batches) for run in runs]
    facts = combined((run.weight, facts_of(trace, kind)) for run, trace in zip(runs, traces))
    peaks = [(run.memory, trace.meter.memory.peaks(kind)) for run, trace in zip(runs, traces) if run.memory]
    totals = combined((weight, {place: total for place, (total, _) in of.items()}) for weight, of in peaks)
    highest = max(set.intersection(*(set(of) for _, of in peaks)), key=lambda place: totals[place])
    facts |= combined((run.memory, peak_at(trace, kind, highest)) for run, trace in zip(runs, traces) if run.memory)
    how = [[run.config.model.num_layers, run.micro_batches, run.weight] for run in runs]
    return {**facts, "runs": how, "cpu_seconds": time.process_time() - begun}, traces[-1]


if __name__ == "__main__":
    main(*sys.argv[1:3])
