"""Attention with grouped queries, of a stream to itself or to a memory. Shapes: b micro-batch, s sequence, t memory, d hidden, h heads
here, g KV heads here, e head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.model.layers import Norm
from megascale.model.ops.attention_cpu import LONGEST, CausalAttention
from megascale.model.ops.attention_flex import flex_attention
from megascale.model.ops.attention_masked import masked_attention
from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.ops.matmul import attention
from megascale.model.position import Rotary, rotate
from megascale.model.products import Product, product_of
from megascale.model.residual import InitStd, Residual
from megascale.model.spec import Cut, Role

# (q [b, h, s, e], k and v [b, g, s, e], what is seen) → [b, h, s, e]
Attend = Callable[[Tensor, Tensor, Tensor, AttentionMask | None], Tensor]


def identity(x: Tensor) -> Tensor:
    return x


class Attention(nn.Module):
    """softmax(q·kᵀ/√e)·v per head, then the output product; `attention_scale` stands for 1/√e where there is one.

    `enter` and `leave` are where tensor parallelism brings its tokens in and sums its results; alone they are the identity. `attend` is
    how tokens meet: `attend`, or `attend_all` where they also see what comes after them; those of other ranks too, where a pass says so.
    """

    def __init__(self, cfg: Model, row: Residual, dtype: torch.dtype, causal: bool, starts: InitStd | None = None) -> None:
        """`starts`: of the matrices, where not the row's."""
        super().__init__()
        starts = starts or row.starts
        d, e, heads, kv_heads = cfg.hidden_size, cfg.head_dim, cfg.num_heads, cfg.num_kv_heads

        def product(out_dim: int, in_dim: int, role: Role, cut: Cut) -> Product:
            bias = cfg.bias and role not in row.scheme.unbiased
            return product_of(cfg, row, out_dim, in_dim, role, cut, dtype, bias, starts)

        def norm(dim: int, cut: Cut, name: str) -> Norm:
            bias = cfg.bias and "norm" not in row.scheme.unbiased
            return Norm(dim, cfg.norm, row.norm_eps[name], cut, dtype, bias, cfg.dyt_alpha[1])

        self.head_dim = e
        # Every kernel divides by √e. What queries are multiplied with is exact in any dtype where it is a power of two (√64 = 8).
        self.query_factor = 1.0 if cfg.attention_scale is None else cfg.attention_scale * e**0.5
        self.q = product(heads * e, d, "query", 0)
        self.k = product(kv_heads * e, d, "key", "kv_heads")
        self.v = product(kv_heads * e, d, "value", "kv_heads")
        self.o = product(d, heads * e, "attention_out", 1)
        normed, self.norm_width = cfg.qk_norm or row.scheme.qk_norm, cfg.qk_norm == "width"
        self.q_norm = (norm(heads * e, 0, "qk_norm") if self.norm_width else norm(e, "heads", "qk_norm")) if normed else None
        self.k_norm = (norm(kv_heads * e, 0, "qk_norm") if self.norm_width else norm(e, "heads", "qk_norm")) if normed else None
        self.inner_norm = norm(heads * e, 0, "attention_inner_norm") if row.scheme.inner_norms else None
        self.enter: Callable[[Tensor], Tensor] = identity
        self.leave: Callable[[Tensor], Tensor] = identity
        self.attend: Attend = attend if causal else attend_all
        self.uses_of_kv: list[int] | None = None  # of each KV head here by how many query heads here, where groups are uneven

    def forward(self, x: Tensor, rotary: Rotary | None, mask: AttentionMask | None, memory: Tensor | None = None) -> Tensor:
        """x [b, s, d] → [b, s, d]; with tokens cut over ranks both have this rank's tokens only. Keys and values are those of the `memory`
        [b, t, d] where there is one; all ranks have the whole of it.
        """
        x = self.enter(x)
        source = x if memory is None else memory
        q, k, v = self.q(x), self.k(source), self.v(source)
        if self.norm_width:
            q, k = self._normed(q, k)
        q, k, v = (y.unflatten(2, (-1, self.head_dim)) for y in (q, k, v))
        if not self.norm_width:
            q, k = self._normed(q, k)  # rows as they lie: heads change places with tokens afterwards
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, rotary.q_cos, rotary.q_sin), rotate(k, rotary.k_cos, rotary.k_sin)
        if self.query_factor != 1.0:
            q = q * self.query_factor
        if self.uses_of_kv is not None:
            k, v = repeat_heads(k, self.uses_of_kv), repeat_heads(v, self.uses_of_kv)
        return self.output(self.attend(q, k, v, mask).transpose(1, 2).flatten(2), x)

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """What the heads here found, y [b, s, h·e], of the tokens x [b, s, d] that entered → [b, s, d]. Other kinds may change it."""
        y = self.o.product(y if self.inner_norm is None else self.inner_norm(y))
        return self.o.add_bias(self.leave(y))

    def take_kv_heads(self, kv: range, of_query: list[int] | None) -> None:
        """Only the KV heads `kv` are used here. `of_query`: the KV head of each query head here, among them, where groups are uneven."""
        self.k.rows = self.v.rows = (kv.start * self.head_dim, kv.stop * self.head_dim)
        self.uses_of_kv = None if of_query is None else [of_query.count(i) for i in range(len(kv))]

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))


def repeat_heads(x: Tensor, times: list[int]) -> Tensor:
    """x [b, g, s, e] → [b, Σ times, s, e], each head as often as `times` says. An index would be a tensor that the device waits for."""
    return torch.cat([head.expand(-1, n, -1, -1) for head, n in zip(x.split(1, 1), times)], 1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
    """q [b, h, s, e], k and v [b, g, s, e] with g dividing h → [b, h, s, e]; without `mask` a token sees itself and all before it."""
    cpu = q.device.type == "cpu"
    if mask is not None and mask.bias is not None:
        return attend_masked(q, k, v, mask.bias)
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
    """The KV heads that the query heads `queries` use, `group` query heads to each; and for every query head its place among them, or None
    where equal runs of query heads use one after the other, as grouped attention takes for granted.
    """
    needed = [h // group for h in queries]
    kv = range(needed[0], needed[-1] + 1)
    run = len(needed) // len(kv)
    even = len(needed) % len(kv) == 0 and needed == [kv[i // run] for i in range(len(needed))]
    return kv, None if even else [h - kv[0] for h in needed]


def attend_all(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
    """`attend` of tokens that see all of k and v [b, g, t, e], which may be others; `mask`, not causal, keeps them inside their documents
    or to the keys that are valid, one at least.
    """
    dense_mask = None
    if mask is not None and mask.bias is not None:
        dense_mask = mask.bias
    elif mask is not None and mask.valid is not None:
        dense_mask = mask.valid[:, None, None, :]
    elif mask is not None and q.device.type == "cpu":
        return masked_attention(q, k, v, mask)
    elif mask is not None and mask.documents is not None:
        dense_mask = mask.documents[:, None, :, None] == mask.documents[:, None, None, :]
    return attend_masked(q, k, v, dense_mask)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, dense_mask: Tensor | None) -> Tensor:
    """`attend` of all that a mask, for torch's attention, leaves to be seen or adds to scores."""
    if q.shape[1] != k.shape[1] and q.device.type == "cpu":
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    return attention(q, k, v, dense_mask, grouped=q.shape[1] != k.shape[1])
