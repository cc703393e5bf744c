"""Advice after an out-of-memory error: available memory, what the run needs, and the smallest changes that would fit."""

from __future__ import annotations

import resource
from contextlib import suppress

import psutil
import torch

from megascale.config.layout import axis_sizes
from megascale.config.schema import Config, Parallel, Train
from megascale.config.support import check
from megascale.data.vocabulary import resolve_vocabulary
from megascale.errors import MegascaleError
from megascale.launch.ranks import RankInfo, node_name
from megascale.limits import memory_limit
from megascale.sizes import byte_words
from megascale.train.device import choose_device
from megascale.train.estimate.memory import needed

ROOM = 0.9  # share of a device that an estimate may fill: it leaves out contexts, buffers of collectives and the allocator's fragments
SPREAD = (2, 4, 8, 16, 32, 64)  # factors on the number of ranks


def limit_of(device: torch.device, ranks: RankInfo) -> float:
    """Bytes that this rank may use: its device's, or its share of the limit of the node, the job, the container or the process."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    total = memory_limit(float(psutil.virtual_memory().total))
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min(total / ranks.local_size, float(own) if own != resource.RLIM_INFINITY else total)


def out_of_memory(reason: str, config: Config, ranks: RankInfo) -> str:
    """`reason` with the memory arithmetic, if it can still be computed."""
    with suppress(Exception):  # memory is short: a failed estimate must not hide the original error
        return f"{reason}; {what_fits(config, choose_device(config, ranks), ranks)}"
    return f"{reason}; halve train.micro_batch_size, set parallel.recompute to full, or use more dp_shard ranks"


def what_fits(config: Config, device: torch.device, ranks: RankInfo) -> str:
    """The memory arithmetic: what is available, what the run needs, and the smallest changes that would fit."""
    limit = limit_of(device, ranks)
    config = check(resolve_vocabulary(config), ranks.size)
    cpu = device.type == "cpu"
    state, live = needed(config, ranks.size, cpu)
    return (
        f"this rank has {byte_words(limit)} on {node_name()}; weights, gradients and optimizer take {byte_words(state)} and the "
        f"activations of {config.train.micro_batch_size} × {config.train.seq_len} tokens about {byte_words(live)}, gathered weights and "
        f"the loss included; {advice(config, ranks.size, limit, cpu)}"
    )


def advice(config: Config, ranks: int, limit: float, cpu: bool = False) -> str:
    """The mildest change of each kind after which a checked config would fit into `limit` bytes per rank."""
    groups = ([f"{words} ({byte_words(need)})" for words, need in group if need < ROOM * limit] for group in options(config, ranks, cpu))
    *cheap, spread = [fitting[:1] for fitting in groups]
    found = [words for fitting in cheap for words in fitting] or spread
    if found:
        return f"by this estimate these would fit: {', or '.join(found)}"
    return "no micro-batch, recomputation or up to 64 times the ranks would fit: choose a smaller model.hidden_size or num_layers"


def options(config: Config, ranks: int, cpu: bool = False) -> list[list[tuple[str, float]]]:
    """Lists of changes, each from mild to strong, with the bytes that the fullest rank would need: smaller micro-batches, recomputation,
    both, more shards alone and with both.
    """
    train, p = config.train, config.parallel
    batches: list[tuple[str, Train]] = []
    while (size := (batches[-1][1] if batches else train).micro_batch_size // 2) > 0:
        batches.append((f"train.micro_batch_size={size}", train.model_copy(update={"micro_batch_size": size})))
    modes = ["selective", "full", "nested"][
        ["none", "selective", "full", "nested"].index("selective" if p.recompute == "budget" else p.recompute) :
    ]
    recomputed = [(f"parallel.recompute={mode}", p.model_copy(update={"recompute": mode})) for mode in modes]
    shards = axis_sizes(p, ranks)["dp_shard"]
    small, least = (batches or [("", train)])[-1], (recomputed or [("", p)])[-1]
    more = [(f"parallel.dp_shard={shards * n} on {ranks * n} ranks with as much memory", shards * n, ranks * n) for n in SPREAD]
    strongest = [option for option in (small, least) if option[0]]
    spread = [
        (" ".join([*(name for name, _ in beside), words]), t, q.model_copy(update={"dp_shard": shards}), n)
        for words, shards, n in more
        for beside, t, q in (([], train, p), (strongest, small[1], least[1]))
    ]
    return [
        [option for words, t in batches for option in _option(words, config, t, p, ranks, cpu)],
        [option for words, q in recomputed for option in _option(words, config, train, q, ranks, cpu)],
        [option for w, t in batches for v, q in recomputed for option in _option(f"{w} {v}", config, t, q, ranks, cpu)],
        [option for words, t, q, n in spread for option in _option(words, config, t, q, n, cpu)],
    ]


def _option(words: str, config: Config, train: Train, parallel: Parallel, ranks: int, cpu: bool) -> list[tuple[str, float]]:
    """One change with its bytes; empty if the support table refuses it."""
    try:
        changed = check(config.model_copy(update={"train": train, "parallel": parallel}), ranks)
    except MegascaleError:
        return []
    return [(words, float(sum(needed(changed, ranks, cpu))))]
