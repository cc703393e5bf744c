"""Grouped-query attention of a stream to itself or to a memory. Shapes: b micro-batch, s sequence, t memory, d hidden, h local heads, g
local KV heads, e head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.model.attention_parts import gate_of, gated, sinks_of, with_sinks
from megascale.model.layers import Norm
from megascale.model.ops.attention_cpu import LONGEST, CausalAttention
from megascale.model.ops.attention_dense import dense_attention
from megascale.model.ops.attention_flex import flex_attention
from megascale.model.ops.attention_fused import takes
from megascale.model.ops.attention_masked import masked_attention
from megascale.model.ops.attention_sink import sink_attention
from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.ops.matmul import attention
from megascale.model.position import Rotary, rotate
from megascale.model.products import Product, product_of
from megascale.model.residual import InitStd, Residual
from megascale.model.spec import Cut, Role

# (q [b, h, s, e], k and v [b, g, s, e], mask) → [b, h, s, e]
Attend = Callable[[Tensor, Tensor, Tensor, AttentionMask | None], Tensor]


def identity(x: Tensor) -> Tensor:
    return x


class Attention(nn.Module):
    """softmax(q·kᵀ/√e)·v per head, times a gate if there is one, then the output product; `attention_scale` replaces 1/√e if it is set.

    With tensor parallelism `enter` gathers tokens and `leave` sums results; otherwise both are the identity. `attend` is the function that
    makes tokens attend to each other: `attend` for causal attention, else `attend_all`. A pass may replace it by one that reaches tokens on
    other ranks.
    """

    def __init__(self, cfg: Model, row: Residual, dtype: torch.dtype, causal: bool, starts: InitStd | None = None) -> None:
        """`starts`: initialization of the matrices, if not the row's."""
        super().__init__()
        starts = starts or row.starts
        d, e, heads, kv_heads = cfg.hidden_size, cfg.head_dim, cfg.num_heads, cfg.num_kv_heads

        def product(out_dim: int, in_dim: int, role: Role, cut: Cut) -> Product:
            biased = cfg.bias if cfg.attention_bias is None else cfg.attention_bias
            bias = (role in ("query", "key", "value") if biased == "qkv" else bool(biased)) and role not in row.scheme.unbiased
            return product_of(cfg, row, out_dim, in_dim, role, cut, dtype, bias, starts)

        def norm(dim: int, cut: Cut, name: str) -> Norm:
            bias = cfg.bias and "norm" not in row.scheme.unbiased
            return Norm(dim, cfg.norm, row.norm_eps[name], cut, dtype, bias, cfg.dyt_alpha[1])

        self.sink, self.causal = cfg.attention_sink, causal
        self.head_dim, self.interleaved = e, cfg.rope_interleaved
        # Every kernel divides by √e. The factor on queries is exact in any dtype if it is a power of two (√64 = 8).
        self.query_factor = 1.0 if cfg.attention_scale is None else cfg.attention_scale * e**0.5
        self.q = product(heads * e, d, "query", 0)
        self.k = product(kv_heads * e, d, "key", "kv_heads")
        self.v = product(kv_heads * e, d, "value", "kv_heads")
        self.gate = gate_of(cfg, e, product)
        self.o = product(d, heads * e, "attention_out", 1)
        self.sinks = sinks_of(cfg, dtype)
        normed, self.norm_width = cfg.qk_norm or row.scheme.qk_norm, cfg.qk_norm == "width"
        self.q_norm = (norm(heads * e, 0, "qk_norm") if self.norm_width else norm(e, "heads", "qk_norm")) if normed else None
        self.k_norm = (norm(kv_heads * e, 0, "qk_norm") if self.norm_width else norm(e, "heads", "qk_norm")) if normed else None
        self.inner_norm = norm(heads * e, 0, "attention_inner_norm") if row.scheme.inner_norms else None
        self.enter: Callable[[Tensor], Tensor] = identity
        self.leave: Callable[[Tensor], Tensor] = identity
        self.attend: Attend = attend if causal else attend_all
        self.uses_of_kv: list[int] | None = None  # local query heads per local KV head, if groups are uneven

    def forward(self, x: Tensor, rotary: Rotary | None, mask: AttentionMask | None, memory: Tensor | None = None) -> Tensor:
        """x [b, s, d] → [b, s, d]; if tokens are split over ranks, both hold this rank's only. Keys and values come from the `memory` [b,
        t, d] if there is one; every rank has all of it.
        """
        x = self.enter(x)
        source = x if memory is None else memory
        q, k, v = self.q(x), self.k(source), self.v(source)
        if self.norm_width:
            q, k = self._normed(q, k)
        q, k, v = (y.unflatten(2, (-1, self.head_dim)) for y in (q, k, v))
        if not self.norm_width:
            q, k = self._normed(q, k)  # before heads and tokens are transposed: rows are contiguous
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rotary is not None:
            q, k = (rotate(x, c, s, self.interleaved) for x, c, s in ((q, *rotary[:2]), (k, *rotary[2:])))
        if self.query_factor != 1.0:
            q = q * self.query_factor
        if self.uses_of_kv is not None:
            k, v = repeat_heads(k, self.uses_of_kv), repeat_heads(v, self.uses_of_kv)
        mask = with_sinks(mask, self.sink, self.sinks, q, self.causal)
        return self.output(self.attend(q, k, v, mask).transpose(1, 2).flatten(2), x)

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """The local heads' result y [b, s, h·e] for the entered tokens x [b, s, d] → [b, s, d]. Other kinds may override it."""
        y = y if self.inner_norm is None else self.inner_norm(y)
        y = y if self.gate is None else gated(y, self.gate(x))
        return self.o.add_bias(self.leave(self.o.product(y)))

    def take_kv_heads(self, kv: range, of_query: list[int] | None) -> None:
        """Restricts this rank to the KV heads `kv`. `of_query`: each local query head's index among them, if groups are uneven."""
        self.k.rows = self.v.rows = (kv.start * self.head_dim, kv.stop * self.head_dim)
        self.uses_of_kv = None if of_query is None else [of_query.count(i) for i in range(len(kv))]

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))


def repeat_heads(x: Tensor, times: list[int]) -> Tensor:
    """x [b, g, s, e] → [b, Σ times, s, e], head i repeated times[i] times. The host would wait for a copy of an index list."""
    return torch.cat([head.expand(-1, n, -1, -1) for head, n in zip(x.split(1, 1), times)], 1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
    """q [b, h, s, e], k and v [b, g, s, e] with g dividing h → [b, h, s, e]; without `mask` a token attends to itself and all before it."""
    cpu = q.device.type == "cpu"
    if mask is not None and mask.bias is not None:
        return attend_masked(q, k, v, mask.bias, mask)
    if mask is not None and mask.sinks is not None and mask.fused and mask.blocks is None:
        return sink_attention(q, k, v, mask.sinks, True)
    if mask is not None:
        return masked_attention(q, k, v, mask) if cpu else flex_attention(q, k, v, mask)
    grouped = q.shape[1] != k.shape[1]
    if grouped and cpu:
        # The CPU's flash kernel takes equal head counts only; the grouped path would fall back to materialized scores.
        repeat = q.shape[1] // k.shape[1]
        k, v, grouped = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), False
    if cpu and q.requires_grad and q.shape[2] <= LONGEST:
        return CausalAttention.apply(q, k, v)  # type: ignore[no-any-return]
    return attention(q, k, v, causal=True, grouped=grouped)


def kv_heads_of(queries: range, group: int) -> tuple[range, list[int] | None]:
    """The KV heads that the query heads `queries` use, with `group` query heads per KV head; and each query head's index among them, or
    None if equal runs of query heads use one after the other, as grouped attention assumes.
    """
    needed = [h // group for h in queries]
    kv = range(needed[0], needed[-1] + 1)
    run = len(needed) // len(kv)
    even = len(needed) % len(kv) == 0 and needed == [kv[i // run] for i in range(len(needed))]
    return kv, None if even else [h - kv[0] for h in needed]


def attend_all(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
    """`attend` for tokens that attend to all of k and v [b, g, t, e], which may be another sequence; `mask`, not causal, restricts them to
    their documents, or to valid keys, of which there is at least one.
    """
    if mask is not None and mask.blocks is not None:
        return flex_attention(q, k, v, mask)
    if mask is not None and mask.sinks is not None and mask.fused and takes(q):
        return sink_attention(q, k, v, mask.sinks, False)
    dense_mask = None
    if mask is not None and mask.bias is not None:
        dense_mask = mask.bias
    elif mask is not None and mask.valid is not None:
        dense_mask = mask.valid[:, None, None, :]
    elif mask is not None and q.device.type == "cpu":
        return masked_attention(q, k, v, mask)
    elif mask is not None and mask.documents is not None:
        dense_mask = mask.documents[:, None, :, None] == mask.documents[:, None, None, :]
    return attend_masked(q, k, v, dense_mask, mask)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, dense_mask: Tensor | None, mask: AttentionMask | None = None) -> Tensor:
    """`attend` with torch's form of a mask: booleans that allow pairs, or numbers added to the scores; None allows all. `mask`: for its cap
    and sinks, with which scores exist whole.
    """
    if mask is not None and (mask.softcap is not None or mask.sinks is not None):
        return dense_attention(q, k, v, dense_mask, mask.softcap, mask.sinks)
    if q.shape[1] != k.shape[1] and q.device.type == "cpu":
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    return attention(q, k, v, dense_mask, grouped=q.shape[1] != k.shape[1])
