"""Tensor parallelism: each rank holds its part of every wide matrix, and two exchanges a sublayer keep the tokens whole.

Without `tp_sequence` all ranks hold all tokens: identity in, sum out. With it the stream between sublayers is cut over the ranks along the
sequence: gather in, reduce-scatter out; the same bytes, 1/tp of the memory for norms and residuals (Korthikanti et al., arXiv 2205.05198).
Weights are plain local tensors; where a part belongs in the whole is in `Placement`, beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from megascale.comm.collectives import copy_to_ranks, gather_parts, local_part, scatter_sum, sum_over_ranks
from megascale.comm.mesh import Axis
from megascale.model.attention import kv_heads_of
from megascale.model.families import Family
from megascale.model.spec import ParamSpec

SEQUENCE = 1  # the dimension of [b, s, d] and [b, s] that is cut


@dataclass(frozen=True)
class Placement:
    """Where this rank's part of a weight stands before data parallelism cuts it further.

    dim       the dimension cut over the tensor axis, or None where every rank holds all of it
    part      this rank's length along `dim`, padding included
    partial   the gradient is this rank's share of a sum over the axis
    """

    spec: ParamSpec
    dim: int | None
    part: int
    partial: bool


def cut_model(model: Family, specs: dict[str, ParamSpec], axis: Axis, tp_sequence: bool) -> dict[str, Placement]:
    """Replaces meta parameters by this rank's parts and hangs the exchanges into the model. Identity at size one."""
    if axis.size == 1:
        return {name: Placement(spec, None, 0, False) for name, spec in specs.items()}
    kv_cut = _cut_kv_heads(model, axis)
    placements = {name: _place(spec, axis, tp_sequence, kv_cut) for name, spec in specs.items()}
    for name, p in placements.items():
        if p.dim is not None:
            _resize(model, name, p)
    if tp_sequence:
        enter, leave = partial(gather_parts, axis=axis, dim=SEQUENCE), partial(scatter_sum, axis=axis, dim=SEQUENCE)
        model.tokens_here = partial(local_part, axis=axis, dim=SEQUENCE)
    else:
        enter, leave = partial(copy_to_ranks, axis=axis), partial(sum_over_ranks, axis=axis)
    for _, block in model.units():
        for sublayer in (block.attention, block.ffn):
            sublayer.enter, sublayer.leave = enter, leave
    model.enter_head, model.leave_embedding = enter, leave
    model.cut_ends(axis)
    heads = model.cfg.num_heads // axis.size
    model.heads_here = (axis.rank * heads, (axis.rank + 1) * heads)
    return placements


def _place(spec: ParamSpec, axis: Axis, tp_sequence: bool, kv_cut: bool) -> Placement:
    cut = spec.cut
    if cut == "kv_heads":
        cut = 0 if kv_cut else "heads"
    if isinstance(cut, int):
        return Placement(spec, cut, -(-spec.shape[cut] // axis.size), False)
    return Placement(spec, None, 0, partial=cut == "heads" or tp_sequence)


def _cut_kv_heads(model: Family, axis: Axis) -> bool:
    """True when the KV heads are cut like the query heads; otherwise gives each attention the rows that its query heads need."""
    cfg = model.cfg
    assert cfg.num_kv_heads is not None and cfg.head_dim is not None
    if cfg.num_kv_heads % axis.size == 0:
        return True
    per_rank, group = cfg.num_heads // axis.size, cfg.num_heads // cfg.num_kv_heads
    kv, of_query = kv_heads_of(range(axis.rank * per_rank, (axis.rank + 1) * per_rank), group)
    for _, block in model.units():
        attention = block.attention
        attention.k.rows = attention.v.rows = (kv.start * cfg.head_dim, kv.stop * cfg.head_dim)
        attention.kv_of_query = of_query
    return False


def _resize(model: nn.Module, name: str, placement: Placement) -> None:
    """Gives a meta parameter its local shape."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    shape = list(placement.spec.shape)
    assert placement.dim is not None
    shape[placement.dim] = placement.part
    old = getattr(owner, leaf)
    setattr(owner, leaf, nn.Parameter(torch.empty(shape, dtype=old.dtype, device="meta")))
