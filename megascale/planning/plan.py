"""`megascale plan` and `ms.plan`: a config and a cluster file → lines and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megascale.config.schema import Config
from megascale.errors import UsageError
from megascale.planning.cluster import load_cluster
from megascale.planning.scale import counts_of, scale, scale_lines
from megascale.planning.search import search
from megascale.planning.study import job_of, study, study_lines
from megascale.planning.words import lines, reliability, report

MOST_DAYS = 3660


def plan_layouts(
    config: Config, cluster_file: str | Path, gpus: int | None = None, days: float | None = None, seed: int = 0
) -> tuple[list[str], dict[str, Any]]:
    """Searches, and simulates `days` of the best layout. Raises UsageError for wrong use, and if nothing fits."""
    cluster = load_cluster(cluster_file)
    if gpus is not None and (type(gpus) is not int or gpus < 1):
        raise UsageError(f"--gpus is {gpus!r}: give the number of GPUs, 1 or more, or leave it out for all {cluster.gpus:,}")
    if days is not None and not 0 < days <= MOST_DAYS:
        raise UsageError(f"--job is {days:g} days: give more than 0 and at most {MOST_DAYS}")
    ranks = cluster.gpus if gpus is None else gpus
    found = search(config, ranks, cluster)
    text, result = lines(found, config, ranks, cluster), report(found, ranks, cluster)
    if days is not None:
        best = found.layouts[0]
        kept = reliability(best, ranks, cluster)
        result["job"] = study(job_of(best.prediction.step_seconds, kept, cluster), days, seed)
        text += ["", *study_lines(result["job"])]
    return text, result


def plan_scale(config: Config, cluster_file: str | Path, span: str) -> tuple[list[str], dict[str, Any]]:
    """Tables over numbers of GPUs. Raises UsageError for wrong use, and if nothing fits anywhere."""
    cluster, counts = load_cluster(cluster_file), counts_of(span)
    result = scale(config, counts, cluster)
    return scale_lines(result), result


def write(result: dict[str, Any], file: Path) -> None:
    """The JSON file. Raises UsageError if it cannot be written."""
    try:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {file} cannot be written: {error.strerror}") from None
