"""fp32 products on CPUs by oneDNN, which torch itself asks for bf16 only.

torch's own are MKL's, which keeps AVX-512 for Intel's processors. On an AMD EPYC, inside a training step, oneDNN's take 0.85 to 0.90 of
their time (docs/numbers.md). Gradients of weights stay with torch, whose products of a transpose are the faster ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Multiplications of a product below which oneDNN's preparation outweighs what it saves.
SMALLEST = 1 << 26
# Asked here, since a compiler cannot ask it; by symbol, since torch promises nothing of a name that begins so.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is here and gains: torch's builds for Apple's processors, for one, have none."""
    return ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() * weight.shape[0] >= SMALLEST


@torch.library.custom_op("megascale::product", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ → [..., out].

    An operator of our own, because to a compiler torch's is one whose weights are constant.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # type: ignore[no-any-return]


@product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    into_x = product(g, weight.t()) if ctx.needs_input_grad[0] else None
    into_weight = g.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
    return into_x, into_weight


product.register_autograd(_backward, setup_context=_save)
