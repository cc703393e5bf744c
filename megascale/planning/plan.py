"""`megascale plan` and `ms.plan`: a config and a cluster file → lines and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megascale.config.schema import Config
from megascale.errors import UsageError
from megascale.planning.cluster import load_cluster
from megascale.planning.search import search
from megascale.planning.words import lines, report


def plan_layouts(config: Config, cluster_file: str | Path, gpus: int | None = None) -> tuple[list[str], dict[str, Any]]:
    """Searches. Raises UsageError for wrong use, and if nothing fits."""
    cluster = load_cluster(cluster_file)
    if gpus is not None and (type(gpus) is not int or gpus < 1):
        raise UsageError(f"--gpus is {gpus!r}: give the number of GPUs, 1 or more, or leave it out for all {cluster.gpus:,}")
    ranks = cluster.gpus if gpus is None else gpus
    found = search(config, ranks, cluster)
    return lines(found, config, ranks, cluster), report(found, ranks, cluster)


def write(result: dict[str, Any], file: Path) -> None:
    """The JSON file. Raises UsageError if it cannot be written."""
    try:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {file} cannot be written: {error.strerror}") from None
