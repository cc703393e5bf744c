"""Every shipped config at its stated size, as its first, middle and last rank: it starts, makes a step, and sends what formulas say.

    python -m benchmarks.planning.shipped [NAME …]

By config: the ranks' CPU seconds and the resident memory of the tracing process; of the first, middle and last rank the peak, the bytes
sent by the program's counters and by the group's own log, model seconds and waits of the host; and the planner's formulas for peak and
bytes. It needs no data and no GPU. Rows of names that are not asked for stay as they are in the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import write
from benchmarks.planning.memory import planned
from benchmarks.planning.trace import CASES
from megascale.config.layout import axis_sizes, describe
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.config.support import check
from megascale.sizes import byte_words
from megascale.trace.run import Asked, TraceFailedError, trace

RESULTS = Path(__file__).parent / "results" / "shipped.json"


def config_of(name: str) -> tuple[Config, int]:
    file, ranks, overrides = CASES[name]
    return check(load_config(f"configs/{file}.yaml", overrides), ranks), ranks


def traced(name: str, of: str = "first,middle,last") -> dict[str, Any]:
    config, ranks = config_of(name)
    try:
        found = trace(config, ranks, Asked(of=of))
    except TraceFailedError as error:
        return {"failed": str(error)}
    sizes = axis_sizes(config.parallel, ranks)
    return {
        "ranks": ranks,
        "layout": describe(config.parallel),
        "axes": {axis: n for axis, n in sizes.items() if n > 1},
        "resident_bytes": found["resident_bytes"],
        "planned": planned(config, ranks),
        "by_rank": {rank: _facts(facts) for rank, facts in found["ranks"].items()},
    }


def _facts(facts: dict[str, Any]) -> dict[str, Any]:
    peak = {kind: round(n) for kind, n in facts["peak_bytes"].items()}
    logged: dict[str, int] = {}
    for exchange, row in facts["exchanges"].items():
        axis = exchange.rsplit(" ", 2)[0]
        logged[axis] = logged.get(axis, 0) + round(row["sent_bytes"])
    return {
        "cpu_seconds": round(facts["cpu_seconds"], 1),
        "runs": facts["runs"],
        "peak": byte_words(sum(peak.values())),
        "peak_bytes": peak,
        "sent_bytes": {axis: round(n) for axis, n in facts["sent_bytes"].items() if n},
        "logged_bytes": {axis: n for axis, n in logged.items() if n},
        "rank_seconds": facts["rank_seconds"],
        "exposed_seconds": facts["exposed_seconds"],
        "kernels": round(facts["kernels"]),
        "host_syncs": {where: round(n) for where, n in facts["host_syncs"].items()},
        "wrong_device": facts["wrong_device"],
    }


if __name__ == "__main__":
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() and sys.argv[1:] else {}
    for name in sys.argv[1:] or CASES:
        kept[name] = traced(name)
        write(__file__, "shipped", {k: kept[k] for k in CASES if k in kept})
