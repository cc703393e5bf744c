"""Memory of a run on the device and on the host: stored state exactly, everything else by the planner's formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import psutil

from megascale.comm.mesh import Axis, Traffic, coordinates
from megascale.comm.piece import chunk_bounds
from megascale.config.axes import EXPERT_AXES, NAMES
from megascale.config.layout import axis_sizes
from megascale.config.optimizers import state_bytes
from megascale.config.schema import Config, Optim
from megascale.errors import UsageError
from megascale.launch.ranks import RankInfo, node_name
from megascale.limits import memory_free
from megascale.model.shape import DTYPES, shape_of
from megascale.model.spec import MATRICES
from megascale.parallel.apply import build_stages, cut_stage
from megascale.parallel.precision import multiply_in_fp8, products_of
from megascale.parallel.shadows import shadowed
from megascale.parallel.tensor import Placement
from megascale.planning.memory import inputs_away, peak_bytes
from megascale.planning.setting import setting_of
from megascale.sizes import byte_words

STATE = ("weights", "gradients", "optimizer")  # kinds of the planner's that are stored state


def largest_rank(config: Config, sizes: dict[str, int]) -> dict[str, int]:
    """`rank_bytes` of the rank that holds most."""
    # Along the shard and tensor axes the first rank has the largest part, as torch.chunk leaves the rest for last; stages differ freely.
    first = coordinates(0, sizes)
    return max((rank_bytes(config, {**first, "pp": r}, sizes) for r in range(sizes["pp"])), key=lambda b: sum(b.values()))


def resident_bytes(config: Config, ranks: int) -> int:
    """Bytes of weights and optimizer state on the fullest of `ranks` ranks: what lies there from the start to the end."""
    held = largest_rank(config, axis_sizes(config.parallel, ranks))
    return held["parameters"] + held["optimizer"] + held.get("shadows", 0)


def rank_bytes(config: Config, place: dict[str, int], sizes: dict[str, int]) -> dict[str, int]:
    """Bytes of stored weights, their gradients, optimizer state and shadows, if there are any, on the rank at `place`. Gathered copies are
    not counted.
    """
    shape = shape_of(config)
    storage = shape.storage
    traffic = Traffic()
    axes = {n: Axis(n, sizes[n], place[n], None, traffic) for n in (*NAMES, *EXPERT_AXES)}
    axes["shard"] = Axis("dp_shard", sizes["dp_shard"] * sizes["cp"], place["dp_shard"] * sizes["cp"] + place["cp"], None, traffic)
    weights = optimizer = copies = 0
    data = sizes["dp_shard"] * sizes["cp"] * sizes["dp_replicate"]
    for stage in build_stages(config.model, shape, config.parallel, place["pp"]):
        multiply_in_fp8(stage, products_of(config.precision))
        copied = {name for name, _ in shadowed(stage)} if config.shadows else set()
        for name, p in cut_stage(stage, axes, config.parallel).items():
            held = _held(p, axes[p.shard] if config.parallel.engine == "fsdp2" else None)
            weights += held * storage.itemsize
            ranks = sizes["edp"] * sizes["dp_replicate"] if p.shard == "edp" else data * sizes["edp"]
            if name in copied and (config.parallel.engine == "ddp" or ranks == 1):
                copies += held * shape.compute.itemsize
            # A tied embedding's copy at the head is optimized on the rank of the embedding.
            if name != "embedding.weight" or stage.part.first:
                own = _local(p, axes[p.shard] if config.parallel.engine == "fsdp2" else None)
                optimizer += optimizer_bytes(config.optim, p, own, storage.itemsize)
    if config.parallel.engine == "deepspeed":
        return _zero_bytes(config, weights // storage.itemsize, sizes["dp_shard"])
    return {"parameters": weights, "gradients": weights, "optimizer": optimizer, **({"shadows": copies} if copies else {})}


def _zero_bytes(config: Config, elements: int, ranks: int) -> dict[str, int]:
    """The same under DeepSpeed, without the padding of its flat buffers: ZeRO shards optimizer state with fp32 masters over the data ranks,
    gradients from stage 2, weights from stage 3; weights have the compute dtype (Rajbhandari et al., arXiv 1910.02054, section 5).
    """
    stage, cut = config.parallel.zero_stage, -(-elements // ranks)
    return {
        "parameters": (cut if stage == 3 else elements) * DTYPES[config.precision.compute].itemsize,
        "gradients": (cut if stage >= 2 else elements) * 4,
        "optimizer": 12 * cut,
    }


def _held(placement: Placement, shard: Axis | None) -> int:
    """Elements on this rank, padding included."""
    return math.prod(_local(placement, shard))


def _local(placement: Placement, shard: Axis | None) -> list[int]:
    """Shape of this rank's part, padding included."""
    local = placement.shape
    if shard is not None:
        first, last = chunk_bounds(local[placement.shard_dim], shard.size, shard.rank)
        local[placement.shard_dim] = last - first
    return local


def optimizer_bytes(optim: Optim, placement: Placement, local: Sequence[int], itemsize: int) -> int:
    """Optimizer state of one weight, of which this rank holds a part of shape `local`."""
    spec = placement.spec
    columns, elements = spec.shape[-1], math.prod(local)
    return state_bytes(optim.name, optim.moments, spec.role in MATRICES, columns, local[-1], elements, itemsize, len(optim.ema))


def needed(config: Config, ranks: int, cpu: bool = False) -> tuple[int, float]:
    """(bytes of stored state, estimated bytes of everything else at the peak of a step) on the device of the fullest rank. The estimate is
    the planner's (planning/memory.py). `cpu`: the ranks compute on CPUs.
    """
    kept = largest_rank(config, axis_sizes(config.parallel, ranks))
    offload = config.parallel.offload
    if "parameters" in offload:
        kept = {}
    elif "optimizer" in offload:
        kept = {**kept, "optimizer": 0}
    state, peak = sum(kept.values()), peak_bytes(_planned(config), ranks, cpu)
    at_peak = sum(size for kind, size in peak.items() if kind not in STATE)
    # Gradients of a single micro-batch are not all there yet when activations are.
    absent = kept.get("gradients", 0) - peak["gradients"]
    return state, max(0.0, at_peak - absent)


def _planned(config: Config) -> Config:
    """The same run as the planner knows it: ZeRO's stages 1 and 2 keep weights gathered, stage 3 gathers layers as FSDP2 does."""
    p = config.parallel
    if p.engine != "deepspeed":
        return config
    changes = {"engine": "fsdp2", "reshard_after_forward": p.zero_stage == 3}
    return config.model_copy(update={"parallel": p.model_copy(update=changes)})


def host_bytes(config: Config, ranks: int) -> dict[str, int]:
    """Bytes that `parallel.offload` keeps in host memory on the fullest rank: `state` (weights, gradients, optimizer) and `inputs`."""
    offload = config.parallel.offload
    state = {"optimizer", "parameters"} & set(offload)
    return {
        "state": sum(largest_rank(config, axis_sizes(config.parallel, ranks)).values()) if state else 0,
        "inputs": round(inputs_away(setting_of(_planned(config), ranks))) if "activations" in offload else 0,
    }


def check_host_room(config: Config, ranks: RankInfo, free: float | None = None) -> None:
    """Raises UsageError if this node, or the job's share of it, has too little memory for what its ranks would offload. `free`: bytes,
    by default those available here.
    """
    if not config.parallel.offload:
        return
    need = host_bytes(config, ranks.size)
    free = memory_free(float(psutil.virtual_memory().available)) if free is None else free
    total = sum(need.values()) * ranks.local_size
    if total > free:
        raise UsageError(
            f"parallel.offload is {', '.join(config.parallel.offload)}: the {ranks.local_size} ranks of {node_name()} would keep "
            f"{byte_words(total)} (per rank {byte_words(need['state'])} of state, {byte_words(need['inputs'])} of block inputs) but "
            f"{byte_words(free)} are free; offload less, shard the state over more dp_shard ranks, or process fewer micro-batches together "
            "(parallel.breadth_first)"
        )
