"""`megascale plan --job DAYS`: the best layout as a simulated job, and what its goodput depends on.

Every row is simulated with the same few seeds, so that rows differ by what was changed and not by luck.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

from megascale.planning.cluster import Cluster
from megascale.planning.goodput import Goodput, share_at
from megascale.planning.job import Job, draw, simulate
from megascale.sizes import duration

SEEDS = 8
REPAIR = 86400.0  # assumed: a broken node comes back after a day
IN_PLACE = 60.0  # assumed: processes start again on the same nodes within a minute
SPELLS = (86400.0, 3600.0, 1.5)  # assumed: links are slow for an hour, a day after the last time, and a step takes half as long again
INTERVALS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0, 16.0)
SPARES = (0, 1, 2, 4, 8, 16)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def job_of(step: float, kept: Goodput, cluster: Cluster) -> Job:
    """A layout's job, which saves at its best interval and always finds a spare."""
    every = 0 if math.isinf(kept.interval) else max(1, round(kept.interval / step))
    return Job(step, every, kept.save_seconds, kept.written_seconds, kept.mean_seconds_to_failure, cluster.restart_seconds)


def study(job: Job, days: float, seed: int = 0) -> dict[str, Any]:
    """Goodput of a job over so many days as it is, and by interval between saves, spare nodes, recovery in place, and slow links."""
    seconds = 86400.0 * days
    every = job.every or max(1, round(3600.0 / job.step))
    steps = sorted({max(1, round(factor * every)) for factor in INTERVALS})
    # The closed form does not know that a save waits until the one before is written.
    closed = {
        n: share_at(n * job.step, job.save, job.failure, job.restart + job.written) if n * job.step >= job.written else None for n in steps
    }
    repaired = replace(job, repair=REPAIR)
    apart, lasting, factor = SPELLS
    return {
        "days": days,
        "seeds": [seed, seed + SEEDS - 1],
        "job": {name: None if value == math.inf else value for name, value in vars(job).items()},
        "as_it_is": row(job, seconds, seed),
        "interval": [
            {"steps": n, "seconds": n * job.step, "closed_form": closed[n], **row(replace(job, every=n), seconds, seed)} for n in steps
        ],
        "spares": [{"spares": n, **row(replace(repaired, spares=n), seconds, seed)} for n in SPARES],
        "in_place": [
            {"share": share, **row(replace(job, in_place=share, in_place_restart=min(IN_PLACE, job.restart)), seconds, seed)}
            for share in SHARES
        ],
        "slow_links": row(replace(job, slow_every=apart, slow=lasting, slow_factor=factor), seconds, seed),
    }


def row(job: Job, seconds: float, seed: int) -> dict[str, Any]:
    """Goodput, its spread over seeds, and the mean share of time by what it went to."""
    runs = [simulate(job, seconds, draw(job, seconds, n)) for n in range(seed, seed + SEEDS)]
    shares = [run.goodput for run in runs]

    def mean(name: str) -> float:
        return statistics.mean(getattr(run, name) for run in runs) / seconds

    parts = {name: mean(name) for name in ("slowed", "lost", "saving", "restarting", "waiting")}
    failures = statistics.mean(run.failures for run in runs)
    return {"goodput": statistics.mean(shares), "least": min(shares), "most": max(shares), "failures": failures, "shares": parts}


def study_lines(found: dict[str, Any]) -> list[str]:
    """The tables for people."""
    first, job = found["as_it_is"], found["job"]
    parts = ", ".join(f"{100 * share:.2f} % {name}" for name, share in first["shares"].items() if share)
    saves = f"a save every {job['every']:,} steps" if job["every"] else "no saves"
    text = [
        f"{found['days']:g} days simulated with {SEEDS} seeds: goodput {_percent(first)} with {saves}, {first['failures']:.1f} failures",
        *([f"  not trained: {parts}"] if parts else []),
        "",
        f"{'save every':>14}{'steps':>8}{'goodput':>10}{'least':>9}{'most':>9}{'closed form':>13}",
    ]
    text += [f"{duration(r['seconds']):>14}{r['steps']:>8,}{_percent(r):>10}{_spread(r)}{_closed(r)}" for r in found["interval"]]
    text += ["", f"{'spare nodes':>14}{'goodput':>10}{'least':>9}{'most':>9}   a broken node comes back after {duration(REPAIR)}"]
    text += [f"{r['spares']:>14}{_percent(r):>10}{_spread(r)}" for r in found["spares"]]
    text += ["", f"{'in place':>14}{'goodput':>10}{'least':>9}{'most':>9}   share of failures after which nodes are sound"]
    text += [f"{100 * r['share']:12.0f} %{_percent(r):>10}{_spread(r)}" for r in found["in_place"]]
    apart, lasting, factor = SPELLS
    slow = found["slow_links"]
    text.append(f"\nlinks that slow steps by {factor:g} for {duration(lasting)}, {duration(apart)} apart: goodput {_percent(slow)}")
    return text


def _percent(r: dict[str, Any]) -> str:
    return f"{100 * r['goodput']:.2f} %"


def _closed(r: dict[str, Any]) -> str:
    return f"{'–':>13}" if r["closed_form"] is None else f"{100 * r['closed_form']:11.2f} %"


def _spread(r: dict[str, Any]) -> str:
    return f"{100 * r['least']:7.2f} %{100 * r['most']:7.2f} %"
