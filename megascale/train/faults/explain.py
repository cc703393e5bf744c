"""Completes the reason of an error: which peer caused it, or what would fit into memory."""

from __future__ import annotations

from megascale.config.schema import Config
from megascale.errors import ExitCode
from megascale.launch.exits import Exit
from megascale.launch.ranks import RankInfo
from megascale.train.estimate.oom_advice import out_of_memory
from megascale.train.faults.watchdog import Watchdog


def explain(ending: Exit, error: BaseException, watch: Watchdog | None, config: Config | None, ranks: RankInfo) -> Exit:
    """`ending` with the reason of `error` completed. For a lost peer this takes some seconds."""
    if ending.code == ExitCode.PEER_LOST and watch is not None:
        return Exit(ending.code, watch.explain(error, ending.reason))
    if ending.code == ExitCode.OUT_OF_MEMORY and config is not None:
        return Exit(ending.code, out_of_memory(ending.reason, config, ranks))
    return ending
