"""Attention with capped scores or sinks whose scores all exist at once: for the few queries of generation, and for masks that are dense
anyway.

Shapes: b batch, h heads, g KV heads dividing h, n queries, t keys, e head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megascale.model.ops.matmul import matmul


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """q [b, h, n, e], k and v [b, g, t, e] → [b, h, n, e]; `mask` [1 or b, 1 or h, n, t]: booleans that allow pairs, or numbers added to
    the capped scores. Scores and softmax in at least fp32.
    """
    wide, grouped = torch.promote_types(q.dtype, torch.float32), (q.shape[0], k.shape[1], -1, q.shape[3])
    scores = q.reshape(grouped).to(wide) @ k.to(wide).transpose(2, 3) * q.shape[3] ** -0.5
    scores = scores.view(*q.shape[:3], -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(wide).view(1, -1, 1, 1).expand(*q.shape[:3], 1)), -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]].to(v.dtype)
    return matmul(weights.reshape(q.shape[0], k.shape[1], -1, k.shape[2]), v).view(q.shape)
