"""Which implementation of a fused operation runs, decided in one place and by symbol.

PyPI's `apex` is another project than NVIDIA's, so a module is taken only when it has the very function that is needed. Each choice is
returned as plain data for the log; an explicit choice that cannot be met is an error, `auto` falls back to torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.errors import UsageError

NormKernel = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]  # (x, weight, bias, eps) → normalized x


@dataclass(frozen=True)
class KernelChoice:
    """The kernels of a run: `norm` to call, and `source` (torch | apex | te) with `reason` for the log."""

    norm: NormKernel
    source: str
    reason: str


def torch_rmsnorm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def torch_layernorm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """γ ⊙ tanh(αx) + b (Zhu et al., arXiv 2503.10622); alpha [1]. No kernel of other packages has it."""
    y = torch.tanh(alpha * x)
    return y * weight if bias is None else torch.addcmul(bias, y, weight)


def own_kernel(norm: str) -> NormKernel:
    """The kernel with which a norm is built. DyT is written out where it stands (`dyt`): nothing calls a kernel for it."""
    return torch_rmsnorm if norm == "rmsnorm" else torch_layernorm


# (module, function) of NVIDIA's packages. apex: `fused_rms_norm_affine(x, weight, normalized_shape, eps)` and
# `fused_layer_norm_affine(x, weight, bias, normalized_shape, eps)`; Transformer Engine has modules only, so its functional form is used.
SYMBOLS = {
    ("apex", "rmsnorm"): ("apex.normalization.fused_layer_norm", "fused_rms_norm_affine"),
    ("apex", "layernorm"): ("apex.normalization.fused_layer_norm", "fused_layer_norm_affine"),
    ("te", "rmsnorm"): ("transformer_engine.pytorch", "RMSNorm"),
    ("te", "layernorm"): ("transformer_engine.pytorch", "LayerNorm"),
}


def choose_kernels(wanted: str, norm: str, device: torch.device) -> KernelChoice:
    """`wanted`: auto | torch | apex | te. Raises UsageError when an explicit choice is not installed or not for this device."""
    own = KernelChoice(own_kernel(norm), "torch", "torch's own")
    if norm == "dyt":
        if wanted not in ("auto", "torch"):
            raise UsageError(f"run.kernels is {wanted} and model.norm is dyt, which {wanted} does not have: use auto or torch")
        return own
    if wanted == "torch" or (wanted == "auto" and device.type != "cuda"):
        return own
    if device.type != "cuda" and wanted != "auto":
        raise UsageError(f"run.kernels is {wanted}, which needs a CUDA device, and run.device is {device.type}: use auto or torch")
    if wanted == "auto":
        # torch's own kernels fuse further under torch.compile, so another package is taken only when asked for by name.
        return KernelChoice(own.norm, "torch", "auto: torch's own compile into one kernel with their neighbours")
    found = probe(wanted, norm)
    if found is None:
        module, symbol = SYMBOLS[(wanted, norm)]
        package = {"apex": "NVIDIA's apex (PyPI's `apex` is another project)", "te": "Transformer Engine"}[wanted]
        raise UsageError(f"run.kernels is {wanted}, and {module} has no {symbol} here: install {package}, or set run.kernels to auto")
    return KernelChoice(found, wanted, f"{SYMBOLS[(wanted, norm)][1]} found")


def probe(source: str, norm: str) -> NormKernel | None:
    """The norm of another package, or None where its symbol is missing."""
    module_name, symbol = SYMBOLS[(source, norm)]
    try:
        function = getattr(importlib.import_module(module_name), symbol, None)
    except Exception:  # a broken CUDA extension raises anything at import; it is as good as absent
        return None
    if function is None:
        return None
    if source == "te":
        return None if not hasattr(function, "forward") else _te_norm(function)

    def apex_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        if norm == "rmsnorm":
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
