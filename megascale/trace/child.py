"""The process that traces: `python -m megascale.trace.child REQUEST ANSWER`, two JSON files. Its device changes torch for good."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def main(request: str, answer: str) -> None:
    from megascale.config.load import build_config
    from megascale.config.support import check
    from megascale.plan.cluster import Cluster
    from megascale.trace.picture import draw_memory, write_chrome
    from megascale.trace.rank import Machine, facts_of, peak_at, trace_rank
    from megascale.trace.reduced import combined, runs_of

    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    ranks = asked["ranks"]
    config = check(build_config(asked["config"]), ranks)
    machine = Machine(Cluster.model_validate(asked["cluster"]))
    found: dict[str, Any] = {}
    runs, kind = runs_of(config, ranks), machine.device.type
    for rank in asked["of"]:
        begun = time.process_time()
        traces = [trace_rank(machine, run.config, ranks, rank, run.micro_batches) for run in runs]
        facts = combined((run.weight, facts_of(trace, kind)) for run, trace in zip(runs, traces))
        everywhere = set.intersection(*(set(trace.meter.memory.peaks(kind)) for trace in traces))
        highest = max(everywhere, key=lambda place: facts["peaks"][place])
        facts |= combined((run.weight, peak_at(trace, kind, highest)) for run, trace in zip(runs, traces))
        if rank == asked["of"][0] and asked["chrome"]:  # of the largest run
            write_chrome(traces[-1], Path(asked["chrome"]))
            draw_memory(traces[-1], kind, Path(asked["picture"]))
        how = [[run.config.model.num_layers, run.micro_batches, run.weight] for run in runs]
        found[str(rank)] = {**facts, "runs": how, "cpu_seconds": time.process_time() - begun}
    result = {
        "ranks": found,
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:3])
