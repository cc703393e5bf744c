"""The parts every family is made of: linear products, norms, dropout. Weights follow the dtype of what they are applied to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.model.kernels import NormKernel
from megascale.model.spec import Cut, ParamSpec, Role, declare


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ + bias → [..., out].

    Every hidden product of the system goes through here, so that another precision or a deferred weight gradient has one place to go.
    """
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Linear(nn.Module):
    """A weight [out, in] with an optional bias.

    `rows`, set by the tensor pass, restricts a weight held whole to the output rows this rank needs.
    """

    bias: Tensor | None

    def __init__(self, out_dim: int, in_dim: int, role: Role, cut: Cut, std: float, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        self.weight = declare(ParamSpec((out_dim, in_dim), role, cut, std), dtype)
        # A bias is cut with the output dimension; the bias of an input-cut weight is added once, after the sum over ranks.
        bias_cut: Cut = "tokens" if cut == 1 else cut
        self.bias = declare(ParamSpec((out_dim,), "bias", bias_cut), dtype) if bias else None
        self.rows: tuple[int, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias = self.bias
        if self.rows is not None:
            weight = weight[self.rows[0] : self.rows[1]]
            bias = None if bias is None else bias[self.rows[0] : self.rows[1]]
        return linear(x, weight, bias)

    def product(self, x: Tensor) -> Tensor:
        """The product without the bias: for input-cut weights, whose partial results are summed over ranks first."""
        return linear(x, self.weight)

    def add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, with statistics in at least fp32."""

    bias: Tensor | None

    def __init__(self, dim: int, kind: str, eps: float, cut: Cut, dtype: torch.dtype, kernel: NormKernel, bias: bool) -> None:
        super().__init__()
        self.dim, self.eps, self.kernel = dim, eps, kernel
        self.weight = declare(ParamSpec((dim,), "norm", cut, mean=1.0), dtype)
        self.bias = declare(ParamSpec((dim,), "norm", cut), dtype) if kind == "layernorm" and bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.kernel(x, self.weight.to(x.dtype), bias, self.eps)


def dropout(x: Tensor, p: float, keys: Tensor | None) -> Tensor:
    """Zeroes entries of x [b, s, d] with probability p and scales the rest by 1/(1−p).

    The mask is a hash of keys [b, s] (one 64-bit number per token and layer) and the channel, so it is the same on every layout and in
    every recomputation. `keys` is None outside training.
    """
    if p == 0.0 or keys is None:
        return x
    channel = torch.arange(x.shape[-1], device=x.device, dtype=torch.int64)
    h = mix64(keys.unsqueeze(-1) ^ mix64(channel))
    keep = (h & 0xFFFFFF) >= int(p * (1 << 24))
    return torch.where(keep, x / (1.0 - p), torch.zeros((), dtype=x.dtype, device=x.device))


def mix64(x: Tensor) -> Tensor:
    """A bijective scrambling of int64 (splitmix64's finalizer, shifts made logical by masks): nearby inputs become unrelated."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
