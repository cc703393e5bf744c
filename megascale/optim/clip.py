"""The global gradient norm, identical on every layout, and the clipping factor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.comm.host import to_device
from megascale.config.schema import Optim
from megascale.optim.rates import group_of
from megascale.parallel.model import Weight


def global_norm(weights: list[Weight], size: int, factors: Mapping[str, float] | None = None) -> Tensor:
    """√Σ of the squares of all gradients over `size` ranks, each element counted once however many ranks hold it. 0-dim, fp64.

    factors  by weight: the factor on its gradient before it is counted (`Multiplier.norm`); 0: it does not count, finite or not
    """
    own = factors or {}
    counted = [(w, factor) for w in weights if (factor := own.get(w.name, 1.0)) != 0]
    grads = [(g, w.replicas / factor**2) for w, factor in counted if (g := w.local_grad) is not None and g.numel() > 0]
    squares = torch.zeros((), dtype=torch.float64, device=weights[0].local.device if weights else None)
    if grads:
        each = _squares([g for g, _ in grads])
        shares = to_device([1.0 / replicas for _, replicas in grads], each.device)
        squares = (each * shares).sum()
    if size > 1:
        dist.all_reduce(squares)
    return squares.sqrt()


def norm_factors(weights: list[Weight], cfg: Optim) -> dict[str, float]:
    """By weight: its factor in the gradient norm, if that is not 1. Frozen weights have no part in it."""

    def factor_of(w: Weight) -> float:
        return 0.0 if group_of(cfg, w.name, w.placement.spec).frozen else cfg.multiplier(w.name).norm

    return {w.name: factor for w in weights if (factor := factor_of(w)) != 1.0}


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """The factor on gradients of this norm: 1 up to the limit, then limit ÷ norm. A limit of 0 never clips."""
    return torch.ones_like(norm) if limit == 0 else (limit / (norm + 1e-6)).clamp(max=1.0)


def _squares(grads: list[Tensor]) -> Tensor:
    """The sum of squares of each tensor, fp64."""
    if grads[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(grads)).to(torch.float64).square()
    # torch's CPU kernel adds all squares one after the other. In fp32 that loses three of seven digits over some millions, and the norm
    # would depend on how weights are sharded. Summing by row avoids this and costs no more.
    return torch.stack([torch.linalg.vector_norm(g, dim=-1).to(torch.float64).square().sum() for g in grads])
