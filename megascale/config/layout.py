"""Ranks → sizes of the mesh's axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megascale.config.axes import NAMES, data_parts
from megascale.config.schema import Config, Moe, Parallel
from megascale.errors import UsageError


def axis_sizes(parallel: Parallel, ranks: int) -> dict[str, int]:
    """Size of every mesh axis, where `dp_shard: -1` (under DDP dp_replicate) takes the remaining ranks; then the sizes of the expert axes.

    Raises UsageError if the product cannot equal the number of ranks.
    """
    sizes: dict[str, int] = {name: getattr(parallel, name) for name in NAMES}
    if parallel.dp_shard in (-1, 0):
        # DDP cannot shard, so the remaining ranks become replicas.
        free = "dp_replicate" if parallel.engine == "ddp" and parallel.dp_replicate == 1 else "dp_shard"
        sizes["dp_shard"] = 1
        sizes[free] = 1
        fixed = _product(sizes)
        if ranks % fixed:
            raise UsageError(
                f"{_words(sizes)} need a multiple of {fixed} ranks, but there are {ranks}: start {_nearest(ranks, fixed)} ranks "
                f"(in a dry run: --ranks {_nearest(ranks, fixed)}), or change an axis of `parallel`"
            )
        sizes[free] = ranks // fixed
    if _product(sizes) != ranks:
        raise UsageError(
            f"{_words(sizes)} make {_product(sizes)} ranks, but there are {ranks}: start {_product(sizes)} ranks, or set "
            "parallel.dp_shard to -1 so that it takes what the other axes leave"
        )
    return {**sizes, **expert_sizes(parallel, sizes)}


def expert_sizes(parallel: Parallel, sizes: dict[str, int]) -> dict[str, int]:
    """Sizes of `edp` and `ep` within a replica: dp_shard·cp·tp = edp·ep·etp. Both are 1 if experts are sharded like dense weights."""
    if parallel.ep == 1 and parallel.expert_tp == parallel.tp:
        return {"edp": 1, "ep": 1}
    return {"edp": sizes["dp_shard"] * sizes["cp"] * sizes["tp"] // (parallel.ep * parallel.expert_tp), "ep": parallel.ep}


def reshard_ranks(parallel: Parallel, ranks: int) -> bool | int:
    """`reshard_after_forward` for FSDP2: a number that covers all ranks over which weights are sharded means all of them."""
    sizes, asked = axis_sizes(parallel, ranks), parallel.reshard_after_forward
    return asked if isinstance(asked, bool) or asked < sizes["dp_shard"] * sizes["cp"] else True


def reshard_fits(parallel: Parallel, ranks: int) -> bool:
    """Whether weights that are sharded over all ranks can be kept on groups of `reshard_after_forward` of them; True if the axes do not fit
    the ranks, which another rule refuses.
    """
    try:
        sizes, asked = axis_sizes(parallel, ranks), reshard_ranks(parallel, ranks)
    except UsageError:
        return True
    return isinstance(asked, bool) or sizes["dp_shard"] * sizes["cp"] % asked == 0


def expert_mesh_fits(parallel: Parallel, ranks: int) -> bool:
    """Whether ep × etp divides the ranks of a replica; True if the dense axes do not fit the ranks, which another rule refuses."""
    try:
        sizes = axis_sizes(parallel, ranks)
    except UsageError:
        return True
    return sizes["dp_shard"] * sizes["cp"] * sizes["tp"] % (parallel.ep * parallel.expert_tp) == 0


def micro_batches(config: Config, ranks: int) -> int:
    """Micro-batches per step and data rank; 1 if the axes do not fit the ranks, which another rule refuses."""
    try:
        sizes = axis_sizes(config.parallel, ranks)
    except UsageError:
        return 1
    return -(-config.train.global_batch_size // (config.train.micro_batch_size * data_parts(sizes)))


def describe(parallel: Parallel) -> str:
    """A resolved layout in a few words: "dp_shard2·tp2", "cp4 ring×ulysses2", or "1 process"."""
    axes = [(n, getattr(parallel, n)) for n in NAMES]
    words = "·".join(f"{n}{size}" for n, size in axes if size > 1)
    if parallel.pp > 1:
        words += f" {parallel.pp_schedule}" + (f"×{parallel.stages_per_rank}" if parallel.stages_per_rank > 1 else "")
    if parallel.cp > 1:
        words += f" {parallel.cp_method}" + (f"×ulysses{parallel.cp_ulysses}" if parallel.cp_ulysses > 1 else "")
    if parallel.ep > 1 or parallel.expert_tp != parallel.tp:
        words += f" ep{parallel.ep}" + (f"·etp{parallel.expert_tp}" if parallel.expert_tp != parallel.tp else "")
    extra = f" {parallel.engine}" if parallel.engine != "fsdp2" and words else ""
    layered = " layered" if parallel.accumulation == "layered" else ""
    return (words or "1 process") + extra + layered


def _product(sizes: dict[str, int]) -> int:
    return math.prod(sizes.values())


def _words(sizes: dict[str, int]) -> str:
    return " × ".join(f"parallel.{n} {s}" for n, s in sizes.items() if s != 1) or "all axes of size 1"


def _nearest(ranks: int, multiple: int) -> int:
    return max(1, ranks // multiple) * multiple


def even_dim(shape: Sequence[int], ranks: int) -> int:
    """The dimension along which FSDP2 shards a weight: the first. It pads that to a multiple of the ranks; where the padding is more than
    an eighth, the first dimension that divides, if there is one (k and v of a large model: 128 rows on 512 ranks).
    """
    padding = -shape[0] % ranks
    return next((d for d, n in enumerate(shape) if n % ranks == 0), 0) if 8 * padding > shape[0] else 0


def ranks_met(moe: Moe, ep: int) -> int:
    """Ranks of ep on which a token's experts may lie at most, as its groups allow."""
    most = min(moe.top_k, ep)
    if moe.groups is None or moe.top_groups is None:
        return most
    group, here = moe.num_experts // moe.groups, moe.num_experts // ep
    spans = -(-group // here) if group % here == 0 or here % group == 0 else -(-group // here) + 1
    return min(most, moe.top_groups * spans)
