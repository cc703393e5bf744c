"""Weights in runs, whose temporary tensors fit into memory together."""

from __future__ import annotations

from collections.abc import Sequence

from megascale.parallel.model import Weight

RUN = 1 << 26  # elements whose updates are held at once: 256 MiB in fp32


def in_runs(weights: Sequence[Weight], elements: int) -> list[list[Weight]]:
    """`weights` in runs of at most so many local elements, at least one weight each."""
    runs: list[list[Weight]] = []
    left = 0
    for w in weights:
        if not runs or w.local.numel() > left:
            runs.append([])
            left = elements
        runs[-1].append(w)
        left -= w.local.numel()
    return runs
