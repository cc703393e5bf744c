"""Which nodes are slow, broken or different, from the measurements of all ranks. Pure functions on plain data."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megascale.measure.health import Health

SKEW = 2.0  # seconds of clock difference beyond which logs and file times mislead


@dataclass(frozen=True)
class Finding:
    """`node` is unfit because of `what`; `grave` findings end the job, others are reported."""

    node: str
    what: str
    grave: bool = True


def diagnose(
    known: Sequence[Health],
    missing: Sequence[tuple[int, str]],
    skew: Mapping[str, float],
    links: Mapping[tuple[str, str], float],
    share: float,
) -> list[Finding]:
    """Findings, gravest kind first.

    missing  (rank, node or "?") that did not report in time
    skew     node → seconds ahead of rank 0
    links    pair of nodes → GB per second
    share    a rate below this share of the median of all ranks is slow
    """
    found = [Finding(node, f"rank {rank} did not report") for rank, node in missing]
    for name, unit, values in (
        ("GEMM", "TFLOP/s", [(h.node, h.gemm_tflops) for h in known]),
        ("memory", "GB/s", [(h.node, h.memory_gb_per_second) for h in known]),
        ("disk", "MB/s", [(h.node, h.disk_mb_per_second) for h in known if h.disk_mb_per_second is not None]),
        ("free memory", "GB", [(h.node, h.free_memory_gb) for h in known]),
    ):
        # The rate of a shared disk varies anyway; a slow one only stalls saves.
        found += _slow(name, unit, values, share, grave=name != "disk")
    found += _slow_links(links, share)
    found += _other_versions(known)
    found += [Finding(n, f"its clock is {s:+.1f} s from rank 0's", grave=False) for n, s in skew.items() if abs(s) > SKEW]
    return list(dict.fromkeys(found))


def exclude_line(findings: Sequence[Finding]) -> str | None:
    """The sbatch option that excludes the unfit nodes."""
    nodes = sorted({f.node for f in findings if f.grave and f.node != "?"})
    return f"--exclude={','.join(nodes)}" if nodes else None


def _slow(name: str, unit: str, values: Sequence[tuple[str, float]], share: float, grave: bool) -> list[Finding]:
    if len(values) < 2:
        return []
    # The upper median: of two nodes, the better one is the reference for the other.
    usual = statistics.median_high([v for _, v in values])
    return [Finding(n, f"{name} {v:.4g} {unit}, and the median is {usual:.4g}", grave) for n, v in values if v < share * usual]


def _slow_links(links: Mapping[tuple[str, str], float], share: float) -> list[Finding]:
    """A node all of whose links are slow is named; a single slow link is reported with both ends, since either may be the cause."""
    if len(links) < 2:
        return []
    usual = statistics.median_high(links.values())
    slow = {pair: rate for pair, rate in links.items() if rate < share * usual}
    ends = Counter(node for pair in slow for node in pair)
    nodes = {node for pair in links for node in pair}
    guilty = [n for n in sorted(nodes) if ends[n] == len(nodes) - 1 and len(nodes) > 2]
    found = [
        Finding(n, f"links {statistics.median_high([r for p, r in links.items() if n in p]):.4g} GB/s, and the median is {usual:.4g}")
        for n in guilty
    ]
    rest = {pair: rate for pair, rate in slow.items() if not set(pair) & set(guilty)}
    return found + [Finding(a, f"link to {b} {rate:.4g} GB/s, and the median is {usual:.4g}", grave=False) for (a, b), rate in rest.items()]


def _other_versions(known: Sequence[Health]) -> list[Finding]:
    found = []
    for key in sorted({k for h in known for k in h.versions}):
        counts = Counter(h.versions.get(key, "none") for h in known)
        usual = counts.most_common(1)[0][0]
        found += [
            Finding(h.node, f"{key} {h.versions.get(key, 'none')}, and most ranks have {usual}")
            for h in known
            if h.versions.get(key, "none") != usual
        ]
    return found
