"""Replaces torch's implementation of an operation in a model's modules."""

from __future__ import annotations

from torch import nn

from megascale.model.layers import Norm
from megascale.model.norms import NormKernel


def call_norm_kernel(stage: nn.Module, kernel: NormKernel) -> None:
    """Makes every norm call `kernel`, from `choose_kernels`. Norms over a sharded dimension are left out: no kernel supports them."""
    for module in stage.modules():
        if isinstance(module, Norm):
            module.kernel = kernel
