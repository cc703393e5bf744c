"""What a trace says, as JSON and as lines: whether it fits, memory, exchanges, waits of the host, time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megascale.planning.cluster import Device
from megascale.sizes import byte_words, work_words
from megascale.trace.memory_kinds import KINDS

TOP = 10


def summary(traced: Mapping[str, Any], flops_per_step: float, order: Any, ranks: int, compute: str) -> dict[str, Any]:
    """The keys of a traced dry run's JSON, for the fullest and the slowest of the traced ranks. `order`: of a pipeline's actions, None
    without one.
    """
    devices: list[Device] = traced["cluster"].devices(ranks)
    device = min(devices, key=lambda d: d.room)
    found = {int(rank): facts for rank, facts in traced["ranks"].items()}
    totals = {rank: round(sum(facts["peak_bytes"].values())) for rank, facts in found.items()}
    fullest = max(totals, key=lambda rank: totals[rank])
    slowest = max(found, key=lambda rank: found[rank]["rank_seconds"])
    seconds, bubble = found[slowest]["rank_seconds"], 0.0
    if order is not None:
        seconds, bubble = pipelined(order, found, slowest)
    sum_of_peaks = ranks * sum(d.peak(compute) for d in devices) / len(devices)
    return {
        "fits": totals[fullest] <= device.room,
        "peak_bytes": {"total": totals[fullest], **{k: round(found[fullest]["peak_bytes"].get(k, 0)) for k in KINDS}},
        "device_bytes": device.memory_bytes,
        "reserve_bytes": device.reserve_bytes,
        "fullest_rank": fullest,
        "sent_bytes": _largest([facts["sent_bytes"] for facts in found.values()]),
        "host_syncs": _largest([facts["host_syncs"] for facts in found.values()]),
        "wrong_device": _largest([facts["wrong_device"] for facts in found.values()]),
        "step_seconds": seconds,
        "bubble": bubble,
        "mfu": flops_per_step / (seconds * sum_of_peaks),
        "exposed_seconds": found[slowest]["exposed_seconds"],
        "launch_bound": found[slowest]["host_seconds"] > 0.95 * found[slowest]["rank_seconds"],
        "kernels": round(found[slowest]["kernels"]),
        "resident_bytes": traced["resident_bytes"],
        "by_rank": {str(rank): facts for rank, facts in found.items()},
    }


def pipelined(order: Any, found: Mapping[int, Mapping[str, Any]], slowest: int) -> tuple[float, float]:
    """(seconds of a step, share of the time in which ranks wait) of an order whose actions take what they took on the traced ranks. A stage
    that none of them has takes as long as the slowest traced one between the first and the last, or of all.
    """
    from megascale.schedule.orders import Action
    from megascale.schedule.timeline import simulate

    rows: dict[tuple[str, int], float] = {}
    for facts in found.values():
        for name, row in facts["actions"].items():
            kind, stage = name.split()
            rows[kind, int(stage)] = row["seconds"] / row["times"]
    last = max((stage for _, stage in rows), default=0)

    def lasts(step: Action) -> float:
        if (step.kind, step.stage) in rows:
            return rows[step.kind, step.stage]
        of = {stage: seconds for (kind, stage), seconds in rows.items() if kind == step.kind}
        return max([seconds for stage, seconds in of.items() if 0 < stage < last] or of.values(), default=0.0)

    timeline = simulate(order, lasts)
    whole = max(span.end for lane in timeline.lanes for span in lane)
    own = sum(row["seconds"] for row in found[slowest]["actions"].values())
    return whole + found[slowest]["rank_seconds"] - own, timeline.bubble


def _largest(rows: list[Mapping[str, float]]) -> dict[str, int]:
    return {axis: round(max(row.get(axis, 0) for row in rows)) for axis in {axis: None for row in rows for axis in row}}


def first_line(report: Mapping[str, Any], name: str) -> str:
    word = "yes" if report["fits"] else "no"
    room = report["device_bytes"] - report["reserve_bytes"]
    whole, reserve = byte_words(report["device_bytes"]), byte_words(report["reserve_bytes"])
    used, left = byte_words(report["peak_bytes"]["total"]), byte_words(room)
    return f"fits: {word}, {used} of {left} ({name}: {whole}, less {reserve} for context, NCCL and workspaces), traced"


def lines_of(report: Mapping[str, Any], compiled: bool) -> list[str]:
    """Everything but the first line."""
    peak = report["peak_bytes"]
    facts = report["by_rank"][str(report["fullest_rank"])]
    lines = [f"traced as rank {', '.join(report['by_rank'])}; most memory on rank {report['fullest_rank']}, at the peak"]
    lines += [f"  {kind:<17}{byte_words(peak[kind]):>10}" for kind in KINDS if peak[kind]]
    lines.append("largest at the peak")
    named = sorted(facts["peak_lines"].items(), key=lambda item: -item[1])
    for name, size in named[:TOP]:
        kind, operation, place = name.split(" | ")
        lines.append(f"  {byte_words(size):>10}  {kind:<17}{operation:<28.28}{place.removeprefix('megascale/')}")
    if facts["host_bytes"] > 1e6:
        lines.append(f"host memory at its peak: {byte_words(facts['host_bytes'])}")
    lines += [*exchange_lines(facts), *formula_lines(report)]
    lines += time_lines(report, facts, compiled)
    lines += [f"the host waits: {n} × {where}" for where, n in report["host_syncs"].items()] or ["the host waits for the device: nowhere"]
    lines += [f"on the wrong device: {n} × {where}" for where, n in report["wrong_device"].items()]
    return lines


def exchange_lines(facts: Mapping[str, Any]) -> list[str]:
    lines = ["sent by this rank in a step" if facts["sent_bytes"] else "nothing is sent"]
    for name, row in sorted(facts["exchanges"].items(), key=lambda item: -item[1]["sent_bytes"]):
        axis, operation, count = name.rsplit(" ", 2)
        if row["sent_bytes"] > 1e3:
            lines.append(
                f"  {axis:<14}{operation:<16}{byte_words(row['sent_bytes']):>10}  {round(row['calls']):,} times over {count} ranks, "
                f"{row['seconds']:.3g} s"
            )
    return lines


def formula_lines(report: Mapping[str, Any]) -> list[str]:
    """Axes over which the planner's formulas send something else than the traced ranks, which may not be those that send most."""
    planned, sent = report["planned_sent_bytes"], report["sent_bytes"]
    odd = [axis for axis in {**sent, **planned} if abs(planned.get(axis, 0) - sent.get(axis, 0)) > 16]
    if not odd:
        return ["  as the formulas of megascale plan say, to the byte"] if sent else []
    return [
        f"  over {axis} the formulas say {byte_words(planned.get(axis, 0))} for the rank that sends most, traced is "
        f"{byte_words(sent.get(axis, 0))}"
        for axis in odd
    ]


def time_lines(report: Mapping[str, Any], facts: Mapping[str, Any], compiled: bool) -> list[str]:
    lines = [
        f"model time: {report['step_seconds']:.3g} s a step, MFU {100 * report['mfu']:.0f} %, "
        f"{report['exposed_seconds']:.3g} s of it waiting for exchanges"
        + (f", bubble {100 * report['bubble']:.0f} %" if report["bubble"] else ""),
        f"  {report['kernels']:,} kernels, {work_words(facts['flops'])} on the rank; "
        + ("launch-bound: the host is slower than the device" if report["launch_bound"] else "the device is busier than the host"),
    ]
    if compiled:
        lines.append("  traced without torch.compile, which fuses kernels and keeps a little less")
    return lines
