"""Tensor parallelism: each rank holds its part of every wide matrix, with two exchanges per sublayer.

Without `tp_sequence` all ranks hold all tokens: identity before a sublayer, all-reduce after it. With it the stream between sublayers is
split along the sequence: all-gather before, reduce-scatter after; the same bytes, and 1/tp of the memory for norms and residuals
(Korthikanti et al., arXiv 2205.05198). Weights are plain local tensors; `Placement` records where a part belongs in the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from megascale.comm.collectives import (
    copy_to_ranks,
    gather_parts,
    local_part,
    max_over_ranks,
    scatter_sum,
    share_sum,
    sum_over_ranks,
)
from megascale.comm.dtensor import is_dtensor
from megascale.comm.mesh import Axis
from megascale.config.schema import Parallel
from megascale.model.attention import kv_heads_of
from megascale.model.family import Family
from megascale.model.layers import Linear, Norm
from megascale.model.spec import ParamSpec

SEQUENCE = 1  # the split dimension of [b, s, d] and [b, s]


@dataclass(frozen=True)
class Slice:
    """A weight split along `dim` over the ranks of `axis`; `part` is this rank's length, including padding."""

    axis: str
    dim: int
    part: int


@dataclass(frozen=True)
class Placement:
    """The placement of this rank's part of a weight.

    cuts       slices by parallelism within a layer; empty if every rank holds all of it
    partial    the gradient is a partial sum over the tensor axis
    shard      the axis over which FSDP2 shards the rest along `shard_dim`
    """

    spec: ParamSpec
    cuts: tuple[Slice, ...] = ()
    partial: bool = False
    shard: str = "shard"
    shard_dim: int = 0

    @property
    def shape(self) -> list[int]:
        """Shape of this rank's part before FSDP2 shards it, including padding."""
        shape = list(self.spec.shape)
        for cut in self.cuts:
            shape[cut.dim] = cut.part
        return shape


def cut_model(model: Family, specs: dict[str, ParamSpec], axis: Axis, cfg: Parallel) -> dict[str, Placement]:
    """Replaces meta parameters by this rank's parts and installs the exchanges in the model. Identity at size one. Experts stay whole for
    the expert pass (parallel/expert.py).

    Sublayers begin and end with products, whose results and gradients nobody else needs: they are summed in place, except where selective
    recomputation keeps the result itself.
    """
    if axis.size == 1:
        return {name: Placement(spec) for name, spec in specs.items()}
    whole_kv = _take_kv_heads(model, axis)
    tp_sequence, fresh = cfg.tp_sequence, cfg.recompute != "selective"
    placements = {name: _place(spec, axis, tp_sequence, not name.startswith(whole_kv)) for name, spec in specs.items()}
    for name, p in placements.items():
        resize(model, name, p)
    if tp_sequence:
        enter, leave = partial(gather_parts, axis=axis, dim=SEQUENCE), partial(scatter_sum, axis=axis, dim=SEQUENCE)
        model.exchanges.tokens_here = partial(local_part, axis=axis, dim=SEQUENCE)
    else:
        enter, leave = partial(copy_to_ranks, axis=axis, fresh=True), partial(sum_over_ranks, axis=axis, fresh=fresh)
    for _, block in model.units():
        for sublayer in block.sublayers:
            sublayer.enter, sublayer.leave = enter, leave
    _share_statistics(model, placements, axis)
    exchanges = model.exchanges
    exchanges.enter_head, exchanges.leave_embedding, exchanges.enter_memory = enter, leave, enter
    exchanges.rows, exchanges.query_heads = axis, partial(_heads_here, axis=axis)
    return placements


def _heads_here(heads: int, axis: Axis) -> range:
    """Global numbers of this rank's query heads of a layer with `heads`."""
    here = heads // axis.size
    return range(axis.rank * here, (axis.rank + 1) * here)


def _place(spec: ParamSpec, axis: Axis, tp_sequence: bool, kv_cut: bool) -> Placement:
    cut = spec.cut
    if cut == "kv_heads":
        cut = 0 if kv_cut else "heads"
    if spec.experts:
        return Placement(spec)
    if isinstance(cut, int):
        return Placement(spec, (Slice("tp", cut, -(-spec.shape[cut] // axis.size)),))
    return Placement(spec, partial=cut == "heads" or tp_sequence)


def _take_kv_heads(model: Family, axis: Axis) -> tuple[str, ...]:
    """Name prefixes of the blocks with too few KV heads to split them like query heads; their attentions get the rows that their query
    heads need.
    """
    whole = []
    for name, block in model.units():
        cfg = block.cfg
        if cfg.num_kv_heads % axis.size == 0:
            continue
        kv, of_query = kv_heads_of(_heads_here(cfg.num_heads, axis), cfg.num_heads // cfg.num_kv_heads)
        for sublayer in block.sublayers:
            if hasattr(sublayer, "take_kv_heads"):
                sublayer.take_kv_heads(kv, of_query)
        whole.append(f"{name}.")
    return tuple(whole)


def _share_statistics(model: nn.Module, placements: dict[str, Placement], axis: Axis) -> None:
    """Norms over a split dimension and quantized products take statistics over all parts, which have equal size."""

    def mean(x: Tensor) -> Tensor:
        return share_sum(x, axis) / axis.size

    for name, module in model.named_modules():
        if isinstance(module, Norm) and placements[f"{name}.weight"].cuts:
            module.mean_parts = mean
        if isinstance(module, Linear) and module.statistics is not None:
            dims = [cut.dim for cut in placements[f"{name}.weight"].cuts]
            if dims:
                module.statistics.weight_mean = mean
            if 1 in dims:
                module.statistics.input_mean, module.statistics.input_max = mean, partial(max_over_ranks, axis=axis)


def resize(model: nn.Module, name: str, placement: Placement) -> None:
    """Gives a meta parameter its local shape."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = getattr(owner, leaf)
    if list(old.shape) != placement.shape:
        setattr(owner, leaf, nn.Parameter(torch.empty(placement.shape, dtype=old.dtype, device="meta")))


@torch.no_grad()
def local_tensor(x: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return x.to_local() if is_dtensor(x) else x.detach()
