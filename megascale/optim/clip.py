"""The global gradient norm, the same on every layout, and the factor that clipping makes of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.comm.host import to_device
from megascale.config.schema import Optim
from megascale.parallel.model import Weight


def global_norm(weights: list[Weight], size: int, factors: Mapping[str, float] | None = None) -> Tensor:
    """√Σ of all gradients' squares over `size` ranks, each part counted once however many ranks hold it. 0-dim, fp64.

    factors  by weight: what its gradient is multiplied with before it is counted (`Multiplier.norm`)
    """
    own = factors or {}
    grads = [(g, w.replicas / own.get(w.name, 1.0) ** 2) for w in weights if (g := w.local_grad) is not None and g.numel() > 0]
    squares = torch.zeros((), dtype=torch.float64, device=weights[0].local.device if weights else None)
    if grads:
        each = _squares([g for g, _ in grads])
        shares = to_device([1.0 / replicas for _, replicas in grads], each.device)
        squares = (each * shares).sum()
    if size > 1:
        dist.all_reduce(squares)
    return squares.sqrt()


def norm_factors(weights: list[Weight], cfg: Optim) -> dict[str, float]:
    """Of the weights that count otherwise than once in the gradient norm."""
    return {w.name: factor for w in weights if (factor := cfg.multiplier(w.name).norm) != 1.0}


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """What gradients of this norm are multiplied with: 1 up to the limit, then limit ÷ norm. A limit of 0 never clips."""
    return torch.ones_like(norm) if limit == 0 else (limit / (norm + 1e-6)).clamp(max=1.0)


def _squares(grads: list[Tensor]) -> Tensor:
    """Σ of squares of each tensor, fp64."""
    if grads[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(grads)).to(torch.float64).square()
    # torch's kernel for CPUs sums all squares one after the other, which in fp32 loses three of seven digits over some millions: a norm
    # that depends on how weights are cut. Rows are short, and cost no more.
    return torch.stack([torch.linalg.vector_norm(g, dim=-1).to(torch.float64).square().sum() for g in grads])
