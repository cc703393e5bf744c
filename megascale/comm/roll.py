"""The roll call before ranks form a group: which ranks have come, and whether they can train together.

Later, a missing rank, or one that opens gloo while the others open nccl, would only be an anonymous time-out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from megascale.errors import MegascaleError, PeerLostError, UsageError
from megascale.launch.ranks import RankInfo, node_name, slurm_node_of

VERDICT = "roll/verdict"
GRACE = 30.0  # extra seconds that other ranks wait for the first rank's verdict
READING = 1.0  # seconds that the store, perhaps in the first rank's process, outlives a verdict that ends the run
SHOWN = 8  # most ranks that a message names


@dataclass(frozen=True)
class Word:
    """A rank's entry in the roll call. `device`: "cpu" or "cuda"; `problem`: why it cannot train."""

    node: str
    device: str
    problem: str = ""


def disagreement(words: Sequence[Word]) -> str | None:
    """Why these ranks cannot train together, the lowest rank's reason first; None if they can."""
    for rank, word in enumerate(words):
        if word.problem:
            return f"rank {rank} on {word.node}: {word.problem}"
    for rank, word in enumerate(words):
        if word.device != words[0].device:
            bare, have = ((rank, word), (0, words[0])) if word.device == "cpu" else ((0, words[0]), (rank, word))
            return (
                f"torch finds no CUDA device for rank {bare[0]} on {bare[1].node}, but rank {have[0]} on {have[1].node} has one: check "
                f"the driver of {bare[1].node} (nvidia-smi), leave that node out, or set run.device=cpu for all"
            )
    return None


def roll_call(store: dist.Store, ranks: RankInfo, device: str, problem: str, patience: float) -> None:
    """Collective. Raises the same error on all ranks that have come: UsageError if they cannot train together, PeerLostError naming those
    that have not come within `patience` seconds.
    """
    store.set(_key(ranks.rank), json.dumps(asdict(Word(node_name(), device, problem))))
    if ranks.rank == 0:
        error = _found(store, ranks, patience)
        store.set(VERDICT, json.dumps([0 if error is None else error.code, str(error or "")]))
        if error is not None:
            time.sleep(READING)
            raise error
        return
    try:
        store.wait([VERDICT], timedelta(seconds=patience + GRACE))
    except dist.DistStoreError:
        raise PeerLostError(f"rank 0 came, but has been silent for {patience + GRACE:.0f} s; run the same command again") from None
    code, text = json.loads(store.get(VERDICT))
    if code:
        raise (PeerLostError if code == PeerLostError.code else UsageError)(text)


def _found(store: dist.Store, ranks: RankInfo, patience: float) -> MegascaleError | None:
    keys = [_key(rank) for rank in range(ranks.size)]
    try:
        store.wait(keys, timedelta(seconds=patience))
    except dist.DistStoreError:
        absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if absent:
            return PeerLostError(missing(absent, ranks.size, patience))
    problem = disagreement([Word(**json.loads(text)) for text in store.multi_get(keys)])
    return None if problem is None else UsageError(problem)


def missing(absent: Sequence[int], size: int, patience: float) -> str:
    """The ranks that have not come, each with its node if SLURM knows it."""
    nodes = {rank: slurm_node_of(rank, os.environ) for rank in absent[:SHOWN]}
    names = ", ".join(f"{rank} on {node}" if node else str(rank) for rank, node in nodes.items())
    more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
    return (
        f"{len(absent)} of {size} ranks have not come within {patience:.0f} s (rank {names}{more}): they never started, ended before they "
        "met the others, or start more slowly (then raise run.start_timeout); run the same command again"
    )


def _key(rank: int) -> str:
    return f"roll/{rank}"
