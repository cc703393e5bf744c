"""fp32 products on CPUs with oneDNN, which torch itself uses for bf16 only.

torch uses MKL, which uses AVX-512 only on Intel processors. On an AMD EPYC, inside a training step, oneDNN takes 0.85 to 0.90 of its time
(docs/numbers.md). Weight gradients stay with torch, whose products with a transpose are faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Multiplications of a product below which oneDNN's overhead outweighs its gain.
SMALLEST = 1 << 26
# Evaluated at import, since compiled code cannot do it; by symbol, since torch guarantees nothing for private names.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is available and faster; torch's builds for Apple's processors, for example, lack it."""
    return ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() * weight.shape[0] >= SMALLEST


@torch.library.custom_op("megascale::product", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ → [..., out].

    An operator of our own, because the compiler treats the weights of torch's as constant.
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
