"""Which implementation modules call, where there is another than torch's own."""

from __future__ import annotations

from torch import nn

from megascale.model.layers import Norm
from megascale.model.norms import NormKernel


def call_norm_kernel(stage: nn.Module, kernel: NormKernel) -> None:
    """Has every norm call `kernel`, which `choose_kernels` chose. The parts of a norm whose dimension is cut are not a kernel's work."""
    for module in stage.modules():
        if isinstance(module, Norm):
            module.kernel = kernel
