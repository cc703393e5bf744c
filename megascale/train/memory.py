"""What a run keeps in memory: stored state exactly, activations by the published estimate, and which settings would fit.

Activation bytes follow Korthikanti et al. 2022 (arXiv:2205.05198) for blocks with fused attention, in two-byte numbers.
"""

from __future__ import annotations

import math
import resource
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from megascale.comm.mesh import AXES, EXPERT_AXES, Axis, Traffic, coordinates
from megascale.comm.piece import chunk_bounds
from megascale.config.layout import axis_sizes, micro_batches
from megascale.config.schema import Config, Parallel, Train
from megascale.config.support import check
from megascale.errors import MegascaleError
from megascale.launch.ranks import RankInfo, node_name
from megascale.model.decoder import Shape
from megascale.model.kernels import choose_kernels
from megascale.optim.optimizers import MATRICES
from megascale.parallel.apply import build_stages, cut_stage
from megascale.parallel.tensor import Placement
from megascale.schedule.orders import compute_order
from megascale.schedule.timeline import simulate
from megascale.train.setup import DTYPES, choose_device, resolve_vocabulary

GB = 1e9


def largest_rank(config: Config, sizes: dict[str, int]) -> dict[str, int]:
    """`rank_bytes` of the rank that holds most."""
    # Of the tensor and shard coordinates the first has the largest part, as torch.chunk leaves the rest for last; stages differ freely.
    first = coordinates(0, sizes)
    return max((rank_bytes(config, {**first, "pp": r}, sizes) for r in range(sizes["pp"])), key=lambda b: sum(b.values()))


def rank_bytes(config: Config, place: dict[str, int], sizes: dict[str, int]) -> dict[str, int]:
    """Bytes of stored weights, their gradients and the optimizer's state on the rank at `place`. Gathered copies come and go and are not
    counted.
    """
    storage = DTYPES[config.precision.storage]
    shape = Shape(config.train.seq_len, storage, DTYPES[config.precision.compute])
    kernel = choose_kernels("torch", config.model.norm, torch.device("cpu")).norm
    traffic = Traffic()
    axes = {n: Axis(n, sizes[n], place[n], None, traffic) for n in (*AXES, *EXPERT_AXES)}
    weights = optimizer = 0
    for stage in build_stages(config.model, shape, kernel, config.parallel, place["pp"]):
        for name, p in cut_stage(stage, axes, config.parallel).items():
            held = _held(p, axes[p.shard] if config.parallel.engine == "fsdp2" else None)
            weights += held * storage.itemsize
            # A tied embedding's copy beside the head is optimized where the embedding is.
            if name != "embedding.weight" or stage.part.first:
                optimizer += optimizer_bytes(config.optim.name, p, held, storage.itemsize)
    return {"parameters": weights, "gradients": weights, "optimizer": optimizer}


def _held(placement: Placement, shard: Axis | None) -> int:
    """Elements on this rank, padding included."""
    local = placement.shape
    if shard is not None:
        first, last = chunk_bounds(local[placement.shard_dim], shard.size, shard.rank)
        local[placement.shard_dim] = last - first
    return math.prod(local)


def optimizer_bytes(name: str, placement: Placement, elements: int, itemsize: int) -> int:
    """State of one weight: one tensor like it for Lion and for Muon's matrices, two and a step count for AdamW."""
    if name == "lion" or (name == "muon" and placement.spec.role in MATRICES):
        return elements * itemsize
    return 2 * elements * itemsize + (4 if elements else 0)


def activation_bytes(config: Config, ranks: int) -> float:
    """Estimated bytes of activations on the fullest rank, micro-batches in flight included; those of embedding and head left out."""
    p, m = config.parallel, config.model
    tokens = config.train.micro_batch_size * config.train.seq_len
    t = p.tp
    cut = 1.0 / t if p.tp_sequence else 1.0
    # Per token and unit of width: 24 bytes live inside the products that tp cuts, 10 outside. Selective recomputation keeps the results of
    # products and attention, about 16 and 2; full only a block's input.
    per_unit = {"none": 24 / t + 10 * cut, "selective": 16 / t + 2 * cut, "full": 2 * cut}[p.recompute]
    in_flight = m.num_layers / (p.pp * p.stages_per_rank)
    if p.pp > 1:
        timeline = simulate(compute_order(p.pp_schedule, p.pp, p.pp_virtual, micro_batches(config, ranks)))
        in_flight *= max(timeline.live)
    width = DTYPES[config.precision.compute].itemsize / 2
    return tokens * m.hidden_size * per_unit * in_flight * width


def needed(config: Config, ranks: int) -> tuple[int, float]:
    """(bytes of stored state, estimated bytes of activations) on the fullest rank."""
    return sum(largest_rank(config, axis_sizes(config.parallel, ranks)).values()), activation_bytes(config, ranks)


def limit_of(device: torch.device, ranks: RankInfo) -> float:
    """Bytes that this rank may use: its device's, or its share of what the node, the container or the process is allowed."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    total = float(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):  # no such file, or "max"
        total = min(total, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min(total / ranks.local_size, float(own) if own != resource.RLIM_INFINITY else total)


def out_of_memory(reason: str, config: Config, ranks: RankInfo) -> str:
    """`reason` with the arithmetic behind it, where that can still be done."""
    with suppress(Exception):  # the process is short of memory: what was known before must not get lost for an estimate
        return f"{reason}; {what_fits(config, choose_device(config, ranks), ranks)}"
    return f"{reason}; halve train.micro_batch_size, set parallel.recompute to full, or use more dp_shard ranks"


def what_fits(config: Config, device: torch.device, ranks: RankInfo) -> str:
    """The arithmetic after an out-of-memory: what there is, what the run needs, and the smallest changes that would fit."""
    limit = limit_of(device, ranks)
    config = check(resolve_vocabulary(config), ranks.size)
    state, live = needed(config, ranks.size)
    text = (
        f"this rank has {limit / GB:.2f} GB on {node_name()}; weights, gradients and optimizer take {state / GB:.2f} GB and the "
        f"activations of {config.train.micro_batch_size} × {config.train.seq_len} tokens about {live / GB:.2f} GB"
    )
    groups = ([f"{words} ({need / GB:.2f} GB)" for words, need in group if need < 0.9 * limit] for group in options(config, ranks.size))
    *cheap, spread = [fitting[:1] for fitting in groups]
    found = [words for fitting in cheap for words in fitting] or spread
    if found:
        return f"{text}; by this estimate would fit: {', or '.join(found)}"
    return f"{text}; no micro-batch, recomputation or up to 64 times the ranks would fit: choose a smaller model.hidden_size or num_layers"


def options(config: Config, ranks: int) -> list[list[tuple[str, float]]]:
    """Changes of one kind a list, from mild to strong, each with the bytes that the fullest rank would need: smaller micro-batches,
    recomputation, both, more shards beside both.
    """
    train, p = config.train, config.parallel
    batches: list[tuple[str, Train]] = []
    while (size := (batches[-1][1] if batches else train).micro_batch_size // 2) > 0:
        batches.append((f"train.micro_batch_size={size}", train.model_copy(update={"micro_batch_size": size})))
    modes = ["selective", "full"][["none", "selective", "full"].index(p.recompute) :]
    recomputed = [(f"parallel.recompute={mode}", p.model_copy(update={"recompute": mode})) for mode in modes]
    shards = axis_sizes(p, ranks)["dp_shard"]
    small, least = (batches or [("", train)])[-1], (recomputed or [("", p)])[-1]
    spread = [
        (
            " ".join(w for w in (small[0], least[0], f"parallel.dp_shard={shards * n} on {ranks * n} ranks") if w),
            least[1].model_copy(update={"dp_shard": shards * n}),
            ranks * n,
        )
        for n in (2, 4, 8, 16, 32, 64)
    ]
    return [
        [option for words, t in batches for option in _option(words, config, t, p, ranks)],
        [option for words, q in recomputed for option in _option(words, config, train, q, ranks)],
        [option for w, t in batches for v, q in recomputed for option in _option(f"{w} {v}", config, t, q, ranks)],
        [option for words, q, n in spread for option in _option(words, config, small[1], q, n)],
    ]


def _option(words: str, config: Config, train: Train, parallel: Parallel, ranks: int) -> list[tuple[str, float]]:
    """One change with its bytes; nothing where it is refused, since then it is no advice."""
    try:
        changed = check(config.model_copy(update={"train": train, "parallel": parallel}), ranks)
    except MegascaleError:
        return []
    return [(words, float(sum(needed(changed, ranks))))]
