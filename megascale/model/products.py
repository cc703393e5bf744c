"""The products of blocks: a matrix, or attention over parameter tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.activations import ACTIVATIONS
from megascale.config.schema import Model, Tokenformer
from megascale.model.layers import Linear
from megascale.model.ops.matmul import linear, matmul
from megascale.model.residual import InitStd, Residual
from megascale.model.spec import Cut, ParamSpec, Role, declare

SMALLEST = 1e-12  # length below which scores count as zero


class ParameterAttention(nn.Module):
    """TokenFormer's product (arXiv 2410.23168): scores of x [..., in] with n keys, scaled to the length `scale` and passed through GELU,
    weigh n values [out]. Tokens can be added: a zero key has zero score and leaves the length unchanged, as long as `scale` stays.
    """

    bias: Tensor | None

    def __init__(self, cfg: Tokenformer, out_dim: int, in_dim: int, role: Role, std: float, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        n = cfg.tokens
        self.scale = cfg.scale or math.sqrt(n)
        # Scores have unit size whatever the keys; initial values make results like those of a matrix with deviation `std`.
        self.keys = declare(ParamSpec((n, in_dim), role, "tokens", std), dtype)
        self.values = declare(
            ParamSpec((n, out_dim), role, "tokens", std * math.sqrt(in_dim / (n * ACTIVATIONS["gelu"].second_moment))), dtype
        )
        self.bias = declare(ParamSpec((out_dim,), "bias", "tokens"), dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.add_bias(self.product(x))

    def product(self, x: Tensor) -> Tensor:
        scores = linear(x, self.keys.to(x.dtype))
        exact = torch.promote_types(x.dtype, torch.float32)
        scores = F.normalize(scores.to(exact), dim=-1, eps=SMALLEST) * self.scale
        return matmul(F.gelu(scores).to(x.dtype), self.values.to(x.dtype))

    def add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype)


Product = Linear | ParameterAttention


def product_of(
    cfg: Model,
    row: Residual,
    out_dim: int,
    in_dim: int,
    role: Role,
    cut: Cut,
    dtype: torch.dtype,
    bias: bool,
    starts: InitStd | None = None,
) -> Product:
    """The product for `cfg.linear`, initialized like the layer's row, or by `starts`."""
    std = (starts or row.starts).std(role, out_dim, in_dim)
    if cfg.tokenformer is not None:
        return ParameterAttention(cfg.tokenformer, out_dim, in_dim, role, std, dtype, bias)
    return Linear(out_dim, in_dim, role, cut, std, dtype, bias, cfg.linear, row.product_scale(in_dim))
