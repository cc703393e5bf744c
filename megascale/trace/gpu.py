"""What CUDA would choose, for the fake device: where torch or the program looks for CUDA, it would take other paths there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
LIBRARIES: list[torch.library.Library] = []  # registrations live as long as these do


def choose_as_cuda() -> None:
    """Fused attention and norms, for good in this process."""
    from megascale.model.ops import attention_flex, attention_fused

    original = F.scaled_dot_product_attention

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        half = q.dtype in (torch.bfloat16, torch.float16)
        if q.device.type == "cpu" or q.dtype == torch.float64 or (enable_gqa and not half):
            return original(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        keeps, bias = q.requires_grad or k.requires_grad, None
        if attn_mask is not None:
            # torch makes numbers of booleans, and expands them without copying.
            bias = attn_mask.to(q.dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        fused = aten._scaled_dot_product_cudnn_attention if half else aten._scaled_dot_product_efficient_attention
        return fused(q, k, v, bias, keeps, dropout_p, is_causal, *([False] if half else []), scale=scale)[0]  # type: ignore[no-any-return]

    def flex(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool, return_aux: Any = None, **_: Any) -> Any:
        """FlexAttention keeps what causal attention keeps; it skips more tiles, so it is faster than this."""
        out = attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)
        return out if return_aux is None else (out, SimpleNamespace(lse=q.new_empty(q.shape[:3], dtype=torch.float32)))

    def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return aten._fused_rms_norm(x, list(shape), weight, eps)[0] if x.device.type != "cpu" else norm(x, shape, weight, eps)  # type: ignore[no-any-return]

    norm = F.rms_norm
    functional: Any = F
    functional.scaled_dot_product_attention, functional.rms_norm = attention, rms_norm
    operators: Any = attention_flex
    operators._kernel = lambda _: flex
    operators = attention_fused
    operators._cudnn = lambda _: True
    library = torch.library.Library("aten", "IMPL")
    for name in ("_fused_rms_norm", "_fused_rms_norm_backward", "silu_backward"):
        library.impl(name, _never, "PrivateUse1")  # that it exists keeps torch from taking it apart
    LIBRARIES.append(library)


def _never(*_: Any, **__: Any) -> Any:
    raise RuntimeError("fakes are not computed")
