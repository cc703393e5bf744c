"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are products of one narrow latent per token, and positions
rotate a few extra channels that all heads' keys share.

Shapes: b micro-batch, s sequence, d hidden, h local heads, e content channels of a head, p rotary channels, f value channels, r width of
the latent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.model.attention import Attend, attend, attend_all, identity
from megascale.model.attention_parts import gate_of, gated, sinks_of, with_sinks
from megascale.model.layers import Linear, Norm
from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.position import Rotary, rotate
from megascale.model.products import Product, product_of
from megascale.model.residual import Residual
from megascale.model.spec import Cut, Role


class LatentAttention(nn.Module):
    """q = W_q·N(W_dq·x), or W_q·x without a query rank; c = N(W_dkv·x); k = W_k·c and v = W_v·c per head. Each head's query and key get p
    more channels, which rotate; the key's are one product of x for all heads.

    With tensor parallelism every rank has all of the latents, whose products it computes for its own heads alone. `absorbed`: attends in
    the latent itself, which is then all that a cache has to keep; equal in exact numbers, and cheap if there are few queries.
    """

    def __init__(self, cfg: Model, row: Residual, dtype: torch.dtype, causal: bool) -> None:
        super().__init__()
        sizes = cfg.latent
        assert sizes is not None
        d, h, e, p, f = cfg.hidden_size, cfg.num_heads, cfg.head_dim, sizes.rope_dim, sizes.value_dim or cfg.head_dim
        self.content, self.turned, self.values, self.rank = e, p, f, sizes.kv_rank

        def product(out_dim: int, in_dim: int, role: Role, cut: Cut) -> Product:
            bias = bool(cfg.attention_bias if cfg.attention_bias is not None else cfg.bias) and role not in row.scheme.unbiased
            return product_of(cfg, row, out_dim, in_dim, role, cut, dtype, bias)

        def norm(dim: int) -> Norm:
            bias = cfg.bias and "norm" not in row.scheme.unbiased
            return Norm(dim, cfg.norm, row.norm_eps["latent_norm"], "heads", dtype, bias, cfg.dyt_alpha[1])

        self.q_down = None if sizes.query_rank is None else product(sizes.query_rank, d, "query", "heads")
        self.q_norm = None if sizes.query_rank is None else norm(sizes.query_rank)
        self.q = product(h * (e + p), sizes.query_rank or d, "query", 0)
        self.kv_down = product(sizes.kv_rank + p, d, "key", "heads")
        self.kv_norm = norm(sizes.kv_rank)
        self.k = product(h * e, sizes.kv_rank, "key", 0)
        self.v = product(h * f, sizes.kv_rank, "value", 0)
        self.gate = gate_of(cfg, f, product)
        self.o = product(d, h * f, "attention_out", 1)
        self.sinks = sinks_of(cfg, dtype)
        self.sink, self.causal = cfg.attention_sink, causal
        self.scale = cfg.attention_scale or (e + p) ** -0.5
        self.absorbed, self.interleaved = False, cfg.rope_interleaved
        self.enter: Callable[[Tensor], Tensor] = identity
        self.leave: Callable[[Tensor], Tensor] = identity
        self.attend: Attend = attend if causal else attend_all

    def forward(self, x: Tensor, rotary: Rotary | None, mask: AttentionMask | None) -> Tensor:
        """x [b, s, d] → [b, s, d]"""
        x = self.enter(x)
        q = self.q(x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x)))
        content, turned = q.unflatten(2, (-1, self.content + self.turned)).transpose(1, 2).split((self.content, self.turned), -1)
        latent, key = self.kv_down(x).split((self.rank, self.turned), -1)
        latent, key = self.kv_norm(latent.contiguous()), key.unsqueeze(1)
        if rotary is not None:
            turned, key = (rotate(x, c, s, self.interleaved) for x, c, s in ((turned, *rotary[:2]), (key, *rotary[2:])))
        meet = self._meet_in_latent if self.absorbed and self.absorbs else self._meet
        mask = with_sinks(mask, self.sink, self.sinks, content, self.causal)
        y = meet(content, turned, latent, key, mask).transpose(1, 2).flatten(2)
        y = y if self.gate is None else gated(y, self.gate(x))
        return self.o.add_bias(self.leave(self.o.product(y)))

    @property
    def absorbs(self) -> bool:
        """Whether the products of the latent are plain matrices, which can be applied to queries and results instead."""
        return all(isinstance(w, Linear) and w.fp8 == "false" and w.statistics is None for w in (self.k, self.v))

    def _meet(self, content: Tensor, turned: Tensor, latent: Tensor, key: Tensor, mask: AttentionMask | None) -> Tensor:
        """Queries [b, h, s, e] and [b, h, s, p], the latent [b, s, r] and the rotated key [b, 1, s, p] → [b, h, s, f]."""
        k = self.k(latent).unflatten(2, (-1, self.content)).transpose(1, 2)
        v = self.v(latent).unflatten(2, (-1, self.values)).transpose(1, 2)
        # Kernels want one size for queries, keys and values: zeros change neither scores nor the other channels.
        size = max(self.content + self.turned, self.values)
        q = torch.cat((content, turned), -1) * (self.scale * size**0.5)
        k = torch.cat((k, key.expand(-1, k.shape[1], -1, -1)), -1)
        q, k, v = (F.pad(t, (0, size - t.shape[-1])) if t.shape[-1] < size else t for t in (q, k, v))
        return self.attend(q, k, v, mask)[..., : self.values]

    def _meet_in_latent(self, content: Tensor, turned: Tensor, latent: Tensor, key: Tensor, mask: AttentionMask | None) -> Tensor:
        """`_meet` with W_k applied to queries and W_v to results: one key and value, the latent, for all heads. A bias of keys moves all
        scores of a query alike and is left out.
        """
        assert isinstance(self.k, Linear) and isinstance(self.v, Linear)
        to_key = self.k.weight.to(latent.dtype).unflatten(0, (-1, self.content)) * self.k.scale
        to_value = self.v.weight.to(latent.dtype).unflatten(0, (-1, self.values)) * self.v.scale
        q = torch.cat((torch.einsum("bhse,her->bhsr", content, to_key), turned), -1) * (self.scale * (self.rank + self.turned) ** 0.5)
        k = torch.cat((latent.unsqueeze(1), key), -1)
        y = torch.einsum("bhsr,hfr->bhsf", self.attend(q, k, k, mask)[..., : self.rank], to_value)
        return y if self.v.bias is None else y + self.v.bias.to(y.dtype).view(-1, 1, self.values)
