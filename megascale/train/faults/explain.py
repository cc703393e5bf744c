"""What is known of an error beyond its own words: which peer is behind it, or what would fit into memory."""

from __future__ import annotations

from megascale.config.schema import Config
from megascale.launch.exits import Exit
from megascale.launch.ranks import RankInfo
from megascale.train.estimate.oom_advice import out_of_memory
from megascale.train.faults.watchdog import Watchdog


def explain(ending: Exit, error: BaseException, watch: Watchdog | None, config: Config | None, ranks: RankInfo) -> Exit:
    """`ending` of `error` with its reason made complete. For a lost peer this takes some seconds."""
    if ending.code == 5 and watch is not None:
        return Exit(5, watch.explain(error, ending.reason))
    if ending.code == 4 and config is not None:
        return Exit(4, out_of_memory(ending.reason, config, ranks))
    return ending
