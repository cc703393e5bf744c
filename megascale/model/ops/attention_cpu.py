"""Causal attention for CPUs at ordinary lengths: about half the time of torch's flash kernel, forward and backward together.

Queries are processed in blocks, each against the keys before its end, so 9/16 of the square is computed with eight blocks. Probabilities
are kept for the backward pass, where the flash kernel computes them again. Memory grows with the square of the length, so long sequences
use the flash kernel.

Shapes: b micro-batch, h heads, s sequence, e head size, n rows of a block, t keys that it attends to.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.model.ops.matmul import product

LONGEST = 1024  # tokens; at this length the probabilities of one head and sequence take 2.25 MiB in fp32
BLOCKS = 8


class CausalAttention(torch.autograd.Function):
    """softmax(q·kᵀ/√e)·v below the diagonal; scores and their gradients in at least fp32, the other products in the dtype of q, k, v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [b, h, s, e] → [b, h, s, e]"""
        wide_q, wide_k, flat_v = _wide(_flat(q)), _wide(_flat(k)), _flat(v)
        parts, kept = [], []
        for first, last in _blocks(q.shape[2]):
            scores = wide_q[:, first:last] @ wide_k[:, :last].transpose(1, 2) * q.shape[-1] ** -0.5
            probabilities = torch.softmax(scores + _hidden(first, last, scores), dim=-1).to(v.dtype)
            parts.append(product(probabilities, flat_v[:, :last]))
            kept.append(probabilities)
        out = torch.cat(parts, dim=1)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out.view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, *kept = ctx.saved_tensors
        d_out, flat_q, flat_k = _flat(grads[0]), _flat(q), _flat(k)
        wide_d, wide_v = _wide(d_out), _wide(_flat(v))
        delta = (wide_d * out).sum(-1, keepdim=True)
        d_q, d_k, d_v = [], [], []
        for (first, last), probabilities in zip(_blocks(q.shape[2]), kept):
            rows = slice(first, last)
            d_p = wide_d[:, rows] @ wide_v[:, :last].transpose(1, 2)
            d_scores = (probabilities * (d_p - delta[:, rows]) * q.shape[-1] ** -0.5).to(q.dtype)
            d_q.append(product(d_scores, flat_k[:, :last]))
            d_k.append(product(d_scores.transpose(1, 2), flat_q[:, rows]))
            d_v.append(product(probabilities.transpose(1, 2), d_out[:, rows]))
        return tuple(g.view(q.shape).to(q.dtype) for g in (torch.cat(d_q, dim=1), _total(d_k), _total(d_v)))  # type: ignore[return-value]


def _total(parts: list[Tensor]) -> Tensor:
    """The sum of [b·h, t, e] for growing t, each padded with zeros: one fused kernel instead of many in-place additions."""
    length = parts[-1].shape[1]
    total = _wide(parts[-1])
    for part in parts[:-1]:
        total = total + F.pad(part, (0, 0, 0, length - part.shape[1]))
    return total


def _flat(x: Tensor) -> Tensor:
    """[b, h, s, e] → [b·h, s, e], contiguous so that slices and transposes of it are views."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


def _wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _blocks(length: int) -> list[tuple[int, int]]:
    step = max(1, -(-length // BLOCKS))
    return [(first, min(first + step, length)) for first in range(0, length, step)]


def _hidden(first: int, last: int, scores: Tensor) -> Tensor:
    """[n, t]: −∞ for keys after their query, else 0."""
    query = torch.arange(first, last, device=scores.device)[:, None]
    key = torch.arange(last, device=scores.device)[None, :]
    return torch.zeros((), dtype=scores.dtype, device=scores.device).where(key <= query, float("-inf"))
