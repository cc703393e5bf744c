"""Peak memory and traffic by the planner's formulas, beside those of the traced step: small configs in many layouts.

    python -m benchmarks.planning.memory [--plan] [NAME …]

Names are those of layouts.py; rows of other names stay as they are in the file. `--plan` plans again and keeps what was traced. Traced is
the first rank; of a pipeline the middle and the last one, too.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.common import write
from benchmarks.planning.layouts import LAYOUTS
from megascale.config.load import build_config
from megascale.config.schema import Config
from megascale.config.support import check
from megascale.planning.memory import peak_of
from megascale.planning.setting import setting_of
from megascale.planning.traffic import sent_bytes
from megascale.trace.run import cluster_of, ranks_asked

RESULTS = Path(__file__).parent / "results" / "memory.json"


def planned(config: Config, ranks: int) -> dict[str, Any]:
    """Peak bytes by kind and bytes sent by axis, by formulas, of an eager step."""
    eager = config.model_copy(update={"parallel": config.parallel.model_copy(update={"compile": False})})
    setting = setting_of(eager, ranks)
    peak, sent = peak_of(setting), sent_bytes(setting)
    return {
        "peak": round(sum(peak.values())),
        "peak_bytes": {kind: round(size) for kind, size in peak.items()},
        "sent_bytes": {axis: round(n) for axis, n in sent.items()},
    }


@cache
def machine() -> Any:
    """The fake device, which changes this process for good."""
    from megascale.trace.rank import Machine

    return Machine(cluster_of(None, 8))


def traced(name: str) -> dict[str, Any]:
    """The same of the traced ranks: the fullest one's peak, and the most that any of them sends."""
    from megascale.trace.child import traced_rank
    from megascale.trace.reduced import runs_of

    config, ranks = checked(name)
    runs = runs_of(config, ranks)
    # The first and the last stage of a pipeline send least.
    of = ranks_asked("first,middle,last" if config.parallel.pp > 1 else "first", ranks)
    found = [traced_rank(machine(), runs, ranks, rank)[0] for rank in of]
    peaks = [{kind: round(n) for kind, n in facts["peak_bytes"].items()} for facts in found]
    sent = {axis: max(round(facts["sent_bytes"].get(axis, 0)) for facts in found) for axis in found[0]["sent_bytes"]}
    fullest = max(peaks, key=lambda peak: sum(peak.values()))
    return {"peak": sum(fullest.values()), "peak_bytes": fullest, "sent_bytes": {axis: n for axis, n in sent.items() if n}}


def checked(name: str) -> tuple[Config, int]:
    ranks, values = LAYOUTS[name]
    return check(build_config(values), ranks), ranks


def row(name: str, there: dict[str, Any] | None) -> dict[str, Any]:
    """A row of the file; `there`: what was traced before."""
    config, ranks = checked(name)
    there = there or traced(name)
    here = planned(config, ranks)
    return {"ranks": ranks, "planned": here, "traced": there, "error": round(here["peak"] / there["peak"] - 1, 4)}


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if name != "--plan"]
    plan_only = "--plan" in sys.argv
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() and (names or plan_only) else {}
    for name in names or (list(kept) if plan_only else LAYOUTS):
        kept[name] = row(name, kept[name]["traced"] if plan_only else None)
        print(name, kept[name]["error"], file=sys.stderr, flush=True)
    write(__file__, "memory", {name: kept[name] for name in LAYOUTS if name in kept})
