"""The verdict on a chain: compares the disturbed run's curve with the undisturbed one, and checks how its attempts ended."""

from __future__ import annotations

import math
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megascale.chaos.chain import Attempt, losses

ROUNDING = 1e-5  # relative difference allowed if attempts had other layouts than the undisturbed run
LEFT_OVER = (".tmp-*", "*.tmp", ".writable")
# Exit codes that a disturbed attempt may have: done, stopped, a peer lost, interrupted twice. 1 to 4 would be this program's fault.
ALLOWED = {0, 5, 75, 130}


def gap(expected: Sequence[tuple[int, float | None]], found: Sequence[tuple[int, float | None]]) -> float:
    """The largest relative difference of losses at a step; infinite if a step is missing or only one loss is finite."""
    then, now = dict(expected), dict(found)
    if set(then) != set(now):
        return math.inf
    worst = 0.0
    for step, loss in then.items():
        other = now[step]
        if loss is None or other is None:
            worst = worst if loss is other else math.inf
        else:
            worst = max(worst, abs(other - loss) / max(abs(loss), 1e-30))
    return worst


def problems(expected: Sequence[tuple[int, float | None]], run: Path, attempts: Sequence[Attempt], same_layout: bool) -> list[str]:
    """Lists everything that should not have happened; empty if the run survived."""
    found = [p for attempt in attempts for p in attempt_problems(attempt)]
    rows = losses(run)
    twice = [step for step, count in Counter(step for step, _ in rows).items() if count > 1]
    missing = sorted({s for s, _ in expected} - {s for s, _ in rows})
    if twice:
        found.append(f"steps {_some(twice)} occur more than once in metrics.jsonl")
    if missing:
        found.append(f"steps {_some(missing)} are missing in metrics.jsonl")
    worst = gap(expected, rows)
    if not missing and worst > (0.0 if same_layout else ROUNDING):
        found.append(f"the loss differs by {worst:.2e} of its value; {0 if same_layout else ROUNDING} is allowed")
    left = sorted(str(p.relative_to(run)) for pattern in LEFT_OVER for p in run.rglob(pattern))
    if left:
        found.append(f"left over in the run's directory: {_some(left)}")
    return found


def attempt_problems(attempt: Attempt) -> list[str]:
    """Lists what went wrong in an attempt."""
    what = f"attempt {attempt.number} ({'; '.join(attempt.faults) or 'undisturbed'})"
    if attempt.codes is None:
        return [f"{what} hung: {attempt.message}"]
    # torchrun turns every exit code into 1; exit.json has the rank's own.
    codes = {c for c in ([attempt.ending] if "torchrun" in attempt.layout else attempt.codes) if c is not None and c >= 0}
    found = []
    if attempt.traceback:
        found.append(f"{what} ended with a traceback: {attempt.message}")
    if codes - ALLOWED:
        found.append(f"{what} ended with {', '.join(str(c) for c in sorted(codes - ALLOWED))}: {attempt.message}")
    if signal.SIGSEGV in {-c for c in attempt.codes} or signal.SIGABRT in {-c for c in attempt.codes}:
        found.append(f"{what} crashed: {attempt.message}")
    return found


def _some(items: Sequence[object]) -> str:
    shown = ", ".join(str(i) for i in items[:5])
    return shown + (f" and {len(items) - 5} more" if len(items) > 5 else "")
