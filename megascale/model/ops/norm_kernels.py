"""Chooses the implementation of fused operations, in one place and by symbol.

PyPI's `apex` is not NVIDIA's, so a module is used only if it has the very function that is needed. Each choice is returned as plain data
for the log; an explicit choice that is not available is an error, `auto` falls back to torch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from megascale.config.norms import NormRow, norms
from megascale.errors import UsageError
from megascale.model.norms import NormKernel
from megascale.model.norms import norm as functions_of


@dataclass(frozen=True)
class KernelChoice:
    """The kernels of a run: `norm` to call, and `source` (torch | apex | te) with `reason` for the log."""

    norm: NormKernel
    source: str
    reason: str


def choose_kernels(wanted: str, norm: str, device: torch.device) -> KernelChoice:
    """`wanted`: auto | torch | apex | te. Raises UsageError if an explicit choice is not installed or does not support this device."""
    row = norms()[norm]
    own = KernelChoice(functions_of(norm).own_kernel(), "torch", "torch's own")
    if wanted not in ("auto", "torch", *row.fused):
        raise UsageError(f"run.kernels is {wanted} but {wanted} does not have model.norm {norm}: use auto or torch")
    if wanted == "torch" or not row.fused or (wanted == "auto" and device.type != "cuda"):
        return own
    if device.type != "cuda" and wanted != "auto":
        raise UsageError(f"run.kernels is {wanted}, which needs a CUDA device, but run.device is {device.type}: use auto or torch")
    if wanted == "auto":
        # torch's own kernels fuse further under torch.compile, so another package is used only if requested by name.
        return KernelChoice(own.norm, "torch", "auto: torch's own compile into one kernel with their neighbours")
    found = probe(wanted, row)
    if found is None:
        module, symbol = row.fused[wanted]
        package = {"apex": "NVIDIA's apex (PyPI's `apex` is another project)", "te": "Transformer Engine"}[wanted]
        raise UsageError(f"run.kernels is {wanted}, but {module} has no {symbol} here: install {package}, or set run.kernels to auto")
    return KernelChoice(found, wanted, f"{row.fused[wanted][1]} found")


def probe(source: str, row: NormRow) -> NormKernel | None:
    """The norm of another package, or None if its symbol is missing."""
    module_name, symbol = row.fused[source]
    try:
        function = getattr(importlib.import_module(module_name), symbol, None)
    except Exception:  # a broken CUDA extension may raise anything at import; treat it as absent
        return None
    if function is None:
        return None
    if source == "te":
        return None if not hasattr(function, "forward") else _te_norm(function)

    def apex_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        if not row.bias:
            return function(x, weight, weight.shape, eps)
        return function(x, weight, torch.zeros_like(weight) if bias is None else bias, weight.shape, eps)

    return apex_norm


def _te_norm(module_class: type[torch.nn.Module]) -> NormKernel:
    """Transformer Engine's norm module, called with our weights through functional_call."""
    cache: dict[tuple[int, float], torch.nn.Module] = {}

    def te_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        key = (weight.numel(), eps)
        if key not in cache:
            cache[key] = module_class(weight.numel(), eps=eps, device="meta")
        weights = {"weight": weight}
        if "bias" in dict(cache[key].named_parameters()):
            weights["bias"] = torch.zeros_like(weight) if bias is None else bias
        return torch.func.functional_call(cache[key], weights, (x,))

    return te_norm
