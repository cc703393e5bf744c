"""Expert parallelism: experts are distributed over the `ep` axis, and tokens are sent to them and back.

The ranks of a replica form two grids, (dp_shard, cp, tp) for dense weights and (edp, ep, etp) for experts, with etp fastest. Each of the
ep ranks holds E/ep experts for the tokens of all of them; over edp the same experts process other tokens, so FSDP2 shards them there. An
expert is split over tp like a dense matrix (etp = tp: every tensor rank sends the same tokens to its own ep group), or not at all (etp =
1: each tensor rank sends its own tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from megascale.comm.collectives import all_reduce
from megascale.comm.exchange import Flight, exchange_counts, on_host
from megascale.comm.mesh import Axis
from megascale.config.axes import AXES
from megascale.config.layout import ranks_met
from megascale.config.schema import Parallel
from megascale.handles import handle_of
from megascale.model.experts import Arrival, Departure, Experts, MixtureOfExperts
from megascale.model.family import Family
from megascale.model.moeut import SwitchHead
from megascale.model.ops.grouped_matmul import permute, places
from megascale.model.router import moved_bias, share_of
from megascale.model.spec import ParamSpec
from megascale.parallel.bounded import bounded_dispatch
from megascale.parallel.deepep import deepep_dispatch
from megascale.parallel.once import once
from megascale.parallel.tensor import Placement, Slice, local_tensor, resize


def cut_experts(model: Family, placements: dict[str, Placement], axes: Mapping[str, Axis], cfg: Parallel) -> dict[str, Placement]:
    """Distributes the experts and installs their exchange in the model, which the tensor pass has already split. Returns the placements of
    all weights.
    """
    own_axes = axes["ep"].size * axes["edp"].size > 1
    placements = {n: _place(p.spec, axes, cfg, own_axes) if p.spec.experts else p for n, p in placements.items()}
    for name, placement in placements.items():
        if placement.spec.experts:
            resize(model, name, placement)
    tp, whole, handle = axes["tp"], cfg.expert_tp == cfg.tp, handle_of(axes["ep"])
    through_deepep = deepep_dispatch(axes["ep"], model.cfg.hidden_size)
    for moe in mixtures(model):
        moe.copies = moe.experts.down.copies = tp.size if whole else 1
        if axes["ep"].size > 1:
            moe.dispatch = partial(dispatch, axis=axes["ep"], handle=handle)
            if cfg.ep_rows is not None:
                moe.dispatch = partial(bounded_dispatch, axis=axes["ep"], handle=handle, factor=cfg.ep_rows)
            elif cfg.ep_kernels == "deepep":
                moe.dispatch = through_deepep
            elif moe.moe.groups is not None:
                most = ranks_met(moe.moe, axes["ep"].size)
                moe.travel = partial(once, num_experts=moe.num_experts, most=most, axis=axes["ep"], handle=handle)
        if not whole:
            # Tokens stay split along the sequence here; only the shared experts need all of them.
            if moe.shared is not None:
                moe.shared.enter, moe.shared.leave = moe.enter, moe.leave
            moe.enter = moe.leave = _as_it_is
            moe.loss_weights_here = model.exchanges.tokens_here
        cut = [axis for axis in (axes["cp"], *(() if whole else (tp,))) if axis.size > 1]
        if cut:
            moe.over_sequence = partial(_sum_over, axes=cut)
    for attention in (m for m in model.modules() if isinstance(m, SwitchHead)):
        if axes["cp"].size > 1:
            attention.over_sequence = partial(_sum_over, axes=[axes["cp"]])
    return placements


def mixtures(model: nn.Module) -> Iterator[MixtureOfExperts]:
    return (m for m in model.modules() if isinstance(m, MixtureOfExperts))


def banks(model: nn.Module) -> Iterator[Experts]:
    return (m for m in model.modules() if isinstance(m, Experts))


def _place(spec: ParamSpec, axes: Mapping[str, Axis], cfg: Parallel, own_axes: bool) -> Placement:
    cuts, split = [], axes["tp"].size > 1 and cfg.expert_tp == cfg.tp
    if axes["ep"].size > 1:
        cuts.append(Slice("ep", 0, spec.shape[0] // axes["ep"].size))
    if split and isinstance(spec.cut, int):
        cuts.append(Slice("tp", spec.cut, spec.shape[spec.cut] // axes["tp"].size))
    shard = "edp" if own_axes else "shard"
    here = Placement(spec, tuple(cuts))
    # Tensor ranks take shares of a bias that is not split.
    return Placement(spec, here.cuts, split and not isinstance(spec.cut, int), shard, shard_dim(here.shape, axes[shard].size))


def shard_dim(shape: list[int], ranks: int) -> int:
    """The dimension of [experts, rows, …] to shard over `ranks`: between experts if that divides evenly, else within them."""
    return 1 if shape[0] % ranks and shape[1] % ranks == 0 else 0


def dispatch(counts: Tensor, axis: Axis, handle: Tensor) -> Departure:
    """Prepares sending rows, sorted by expert, to the ranks that hold the experts; see `Dispatch` in model/experts.py."""
    mine = counts.view(axis.size, -1)
    here = exchange_counts(mine, handle)  # [ranks, experts here]
    # The host needs these to allocate the incoming rows. It reads them when rows are sent.
    splits = on_host(torch.stack((mine.sum(1), here.sum(1))))

    def depart(rows: Tensor) -> list[Arrival]:
        there = Flight(rows, splits, handle)
        # They arrive sorted by rank, then by expert.
        coming, of_expert = there.travelling.shape[0], here.t().flatten()
        begins = here.flatten().cumsum(0).view_as(here) - here
        order, inverse = places(of_expert, begins.t().flatten(), of_expert.cumsum(0) - of_expert, coming, coming)

        def wait() -> tuple[Tensor, Tensor]:
            return permute(there.land(), order, inverse), here.sum(0)

        def back(results: Tensor) -> Tensor:
            return Flight(permute(results, inverse, order), splits, handle, True, rows.shape[0]).land()

        return [Arrival(wait, back)]

    return depart


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _sum_over(x: Tensor, axes: list[Axis]) -> Tensor:
    x = x.clone()
    for axis in axes:
        x = all_reduce(x, axis)
    return x


@torch.no_grad()
def settle_routers(stages: list[Family], axes: Mapping[str, Axis], finite: Tensor) -> None:
    """After an update, before the step's metrics are read: moves the selection biases by the load of the whole global batch and notes that
    load for the next step's loss, in one message for all local layers, and renormalizes the expert rows of routers by direction. A step
    that was not `finite` moves nothing.
    """
    layers = [moe for stage in stages for moe in mixtures(stage)]
    balanced = [moe for moe in layers if moe.router.bias is not None or moe.router.share is not None]
    if balanced:
        # Ranks with the same tokens all count them: only ratios and the signs of differences matter.
        counts = torch.cat([moe.metrics.totals["counts"] for moe in balanced])
        for axis in AXES:
            if not axis.other_layers:
                counts = all_reduce(counts, axes[axis.name])
        for moe, count in zip(balanced, counts.split([moe.num_experts for moe in balanced])):
            bias, share = moe.router.bias, moe.router.share
            if bias is not None:
                bias.copy_(moved_bias(bias, count, moe.moe.bias_rate).where(finite, bias))
            if share is not None:
                share.copy_(share_of(count).to(share.dtype).where(finite, share))
    for moe in layers:
        if (of := moe.router.row.directions) is not None:
            rows = local_tensor(moe.router.weight)
            rows.mul_(of.length / rows.norm(dim=-1, keepdim=True))
