"""Layers that all families use: linear products, norms, dropout. Weights are cast to the dtype of their input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from megascale.model.deferred import Deferred, deferred_product
from megascale.model.module_metrics import ModuleMetrics
from megascale.model.norms import NormKernel
from megascale.model.norms import norm as norm_functions
from megascale.model.ops import matmul, matmul_cpu
from megascale.model.ops.bitlinear import Statistics, quantized_input, quantized_weight
from megascale.model.shadow import product_weight
from megascale.model.spec import Cut, ParamSpec, Role, declare
from megascale.precision.dynamic import dynamic_linear
from megascale.precision.fp8 import E4M3, E5M2, fp8_linear, to_fp8, weight_gradient
from megascale.splitmix import mix64_signed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ + bias → [..., out].

    Every hidden product of the system goes through here, so that another precision or a deferred weight gradient needs only one change.
    """
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if matmul_cpu.takes(x, weight):
        y = matmul_cpu.product(x, weight)
        return y if bias is None else y + bias
    return matmul.linear(x, weight, bias)


# How a product is computed: in the input's dtype, in FP8 with static scales, or with measured ones per tensor or per row.
Fp8 = Literal["false", "static", "tensorwise", "rowwise"]


class Linear(nn.Module):
    """A weight [out, in] with an optional bias; the product is multiplied by `scale`.

    `rows`, set by the tensor pass, restricts an unsharded weight to the output rows that this rank needs. The pipeline lets the weight's
    gradient be `deferred` (deferred.py) under schedules that compute it separately. The precision pass sets `fp8`, `metrics` and, on some
    steps, `watch`, the handle of what hears the losses of casts.
    `kind` is dense or bitlinear (bitlinear.py); `shadow` is the weight in the compute dtype (shadow.py).
    """

    bias: Tensor | None
    columns: int | None = None  # set if only a prefix of the inputs exists (MatFormer)

    def __init__(
        self,
        out_dim: int,
        in_dim: int,
        role: Role,
        cut: Cut,
        std: float,
        dtype: torch.dtype,
        bias: bool = False,
        kind: str = "dense",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.role, self.scale = role, scale
        self.fp8: Fp8 = "false"
        self.watch: Tensor | None = None
        self.metrics: ModuleMetrics | None = None
        self.weight = declare(ParamSpec((out_dim, in_dim), role, cut, std), dtype)
        # A bias is split along the output dimension; with an input-split weight it is added once, after the sum over ranks.
        bias_cut: Cut = "tokens" if cut == 1 else cut
        self.bias = declare(ParamSpec((out_dim,), "bias", bias_cut), dtype) if bias else None
        self.rows: tuple[int, int] | None = None
        self.deferred: Deferred | None = None
        self.handle: Tensor | None = None
        self.statistics = Statistics() if kind == "bitlinear" else None
        self.shadow: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.deferred is not None or self.statistics is not None or self.scale != 1.0 or self.fp8 != "false":
            return self.add_bias(self.product(x))
        weight = product_weight(self)
        return linear(x, weight if self.rows is None else weight[slice(*self.rows)], self._bias())

    def product(self, x: Tensor) -> Tensor:
        """The product without the bias: for input-split weights, whose partial results are summed over ranks first."""
        weight = product_weight(self)
        weight = weight if self.columns is None else weight[:, : self.columns]
        if self.statistics is not None:
            x, weight = quantized_input(x, self.statistics), quantized_weight(weight, self.statistics)
        rows = slice(*self.rows) if self.rows else slice(None)
        if self.deferred is not None and torch.is_grad_enabled():
            part = weight.detach()[rows]
            return deferred_product(self, x, partial(self._multiply, weight=part), part.shape[0])
        return self._multiply(x, weight if self.rows is None else weight[rows])

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.fp8 == "static":
            return fp8_linear(x, weight, self.scale, self.watch)
        y = linear(x, weight) if self.fp8 == "false" else dynamic_linear(x, weight, self.fp8)
        return y if self.scale == 1.0 else y * self.scale

    def hear(self, about: str, *values: Tensor) -> None:
        assert self.deferred is not None
        self.deferred.append(partial(self._add_gradient, *values))

    @torch.no_grad()
    def _add_gradient(self, g: Tensor, x: Tensor) -> None:
        """Adds the weight gradient from the result's gradient g [..., out] and the input x [..., in]."""
        rows = slice(*self.rows) if self.rows else slice(None)
        weight, g, x = self.weight, g.flatten(0, -2), x.flatten(0, -2)
        if self.fp8 == "static":
            part = weight_gradient(to_fp8(g, E5M2), to_fp8(x, E4M3), self.scale, g.dtype)
        else:
            part = matmul.product(g.t(), x)
            part = part if self.scale == 1.0 else part * self.scale
        part = part.to(weight.dtype)
        if weight.grad is None and part.shape == weight.shape:
            weight.grad = part
            return
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad[rows] += part

    def add_bias(self, y: Tensor) -> Tensor:
        bias = self._bias()
        return y if bias is None else y + bias.to(y.dtype)

    def _bias(self) -> Tensor | None:
        return self.bias if self.bias is None or self.rows is None else self.bias[slice(*self.rows)]


class Norm(nn.Module):
    """A norm of config/norms.py over the last dimension: its row defines the computation and the weights.

    If the tensor pass splits the dimension, `mean_parts` turns the mean over this rank's equal part [..., 1] into that over all.
    """

    bias: Tensor | None
    alpha: Tensor | None

    def __init__(self, dim: int, kind: str, eps: float, cut: Cut, dtype: torch.dtype, bias: bool, alpha: float = 0.5) -> None:
        super().__init__()
        functions = norm_functions(kind)
        self.dim, self.row, self.functions, self.eps = dim, functions.row, functions, eps
        self.kernel: NormKernel = functions.own_kernel()  # a pass may replace it
        self.weight = declare(ParamSpec((dim,), "norm", cut, mean=1.0 - self.row.offset), dtype)
        self.bias = declare(ParamSpec((dim,), "norm", cut), dtype) if self.row.bias and bias else None
        # One number for all channels: if these are split, each rank has a partial gradient.
        alpha_cut: Cut = "heads" if cut == 0 else cut
        self.alpha = declare(ParamSpec((1,), "scale", alpha_cut, mean=alpha), dtype) if self.row.scale else None
        self.mean_parts: Callable[[Tensor], Tensor] | None = None
        self.copied = False  # whether backward uses copied values, for weights that are not gathered again

    def forward(self, x: Tensor) -> Tensor:
        gain = self.weight + self.row.offset if self.row.offset else self.weight
        weight, bias = gain.to(x.dtype, copy=self.copied), None if self.bias is None else self.bias.to(x.dtype)
        if self.alpha is not None:
            x = self.alpha.to(x.dtype, copy=self.copied) * x
        mean_parts = self.mean_parts
        if mean_parts is None or not self.row.divides:
            return self.kernel(x, weight, bias, self.eps)
        return self.functions.with_mean(x, weight, bias, self.eps, lambda t: mean_parts(t.mean(-1, keepdim=True)))


def dropout(x: Tensor, p: float, keys: Tensor | None) -> Tensor:
    """Zeroes entries of x [b, s, d] with probability p and scales the rest by 1/(1−p).

    The mask is a hash of keys [b, s] (one 64-bit number per token and layer) and the channel, so it is the same on every layout and in
    every recomputation. `keys` is None outside training.
    """
    if p == 0.0 or keys is None:
        return x
    channel = torch.arange(x.shape[-1], device=x.device, dtype=torch.int64)
    h = mix64_signed(keys.unsqueeze(-1) ^ mix64_signed(channel))
    keep = (h & 0xFFFFFF) >= int(p * (1 << 24))
    return torch.where(keep, x / (1.0 - p), torch.zeros((), dtype=x.dtype, device=x.device))
