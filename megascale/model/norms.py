"""The functions of norms. Their rows, which name these functions, are in config/norms.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.config.norms import NormRow, norms
from megascale.plugins import resolve

NormKernel = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]  # (x, weight, bias, eps) → normalized x
Mean = Callable[[Tensor], Tensor]  # [..., channels here] → the mean over all channels [..., 1]


@dataclass(frozen=True)
class NormFunctions:
    """A row with its functions imported."""

    row: NormRow
    normalize: Callable[[Tensor, Mean, float], Tensor]
    kernel: NormKernel | None

    def own_kernel(self) -> NormKernel:
        """The kernel that modules are built with."""
        return self.kernel or self._written_out

    def _written_out(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return self.with_mean(x, weight, bias, eps, lambda t: t.mean(-1, keepdim=True))

    def with_mean(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, mean: Mean) -> Tensor:
        """The norm of x [..., channels here], with statistics in at least fp32."""
        y = self.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), mean, eps).to(x.dtype) * weight
        return y if bias is None else y + bias


def norm(name: str) -> NormFunctions:
    """The norm of `model.norm`. Raises UsageError for a plugin's row whose functions cannot be imported."""
    row, whose = norms()[name], f"the norm {name}"
    return NormFunctions(row, resolve(row.normalize, whose), None if row.kernel is None else resolve(row.kernel, whose))


def rms_normalized(x: Tensor, mean: Mean, eps: float) -> Tensor:
    return x * torch.rsqrt(mean(x.square()) + eps)


def layer_normalized(x: Tensor, mean: Mean, eps: float) -> Tensor:
    return rms_normalized(x - mean(x), mean, eps)


def tanh_of(x: Tensor, mean: Mean, eps: float) -> Tensor:
    return torch.tanh(x)


def rmsnorm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def layernorm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def tanh(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """γ ⊙ tanh(αx) + b (DyT; Zhu et al., arXiv 2503.10622) of x already multiplied by α."""
    y = torch.tanh(x)
    return y * weight if bias is None else torch.addcmul(bias, y, weight)
