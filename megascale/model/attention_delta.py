"""Linear attention by the gated delta rule (Gated DeltaNet, arXiv 2412.06464; as in Qwen3-Next): heads keep a state of constant size in
place of keys and values.

Shapes: b micro-batch, s sequence, d hidden, n local key heads, h = n·r local value heads, K and V channels of a key and of a value, w
tokens of the convolution, S whole sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.model.attention import identity
from megascale.model.layers import Linear, Norm
from megascale.model.ops.attention_tiles import AttentionMask, document_starts
from megascale.model.ops.delta_rule import delta_rule
from megascale.model.position import Rotary
from megascale.model.products import Product, product_of
from megascale.model.residual import Residual
from megascale.model.spec import Cut, ParamSpec, Role, declare

SHORTEST = 1e-6  # added to the squared length that queries and keys are divided by


class Streams(NamedTuple):
    """What tokens bring: q and k [b, s, n, K], v [b, s, h, V], and for each value head a number a for the decay and b for the rate
    [b, s, h]."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


class HeadWeights(NamedTuple):
    """What heads bring: taps of the convolution over q and k [n·K, w] and v [h·V, w], and the laws of decay [h]."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    step: Tensor


Ahead = Callable[[Tensor, int], list[Tensor]]  # (x [b, s, c], m) → each piece of it with the m tokens before that piece
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]  # delta_rule, or one that reaches other ranks
Recall = Callable[[Streams, HeadWeights, AttentionMask | None], Tensor]


class Taps(nn.Module):
    """Weights [channels, w] of a causal convolution of each channel with itself, the last for the token itself."""

    def __init__(self, channels: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = declare(ParamSpec((channels, size), "scale", 0, math.sqrt(1 / size)), dtype)


class GatedDelta(nn.Module):
    """Queries, keys and values pass a short convolution, SiLU, and for the first two a division by their length. Value head i has the
    query and key i//r, writes at the rate β = sigmoid(b) and forgets by the factor e^g, g = −e^A_log·softplus(a + dt_bias). What a head
    reads is normalized and multiplied by SiLU of a gate z; then the output product.

    Tokens meet through `attend` alone, which passes and generation replace.
    """

    def __init__(self, cfg: Model, row: Residual, dtype: torch.dtype, causal: bool) -> None:
        super().__init__()
        assert causal and cfg.delta is not None, "rules refuse encoders"
        sizes, d = cfg.delta, cfg.hidden_size
        keys, values, w = sizes.key_heads * sizes.key_dim, sizes.value_heads * sizes.value_dim, sizes.conv_size
        self.key_dim, self.value_dim = sizes.key_dim, sizes.value_dim

        def product(out_dim: int, in_dim: int, role: Role, cut: Cut) -> Product:
            bias = bool(cfg.attention_bias if cfg.attention_bias is not None else cfg.bias) and role not in row.scheme.unbiased
            return product_of(cfg, row, out_dim, in_dim, role, cut, dtype, bias)

        def of_heads() -> Linear:
            std = row.starts.std("head_gate", sizes.value_heads, d)
            return Linear(sizes.value_heads, d, "head_gate", 0, std, dtype, scale=row.product_scale(d))

        self.q, self.k = product(keys, d, "query", 0), product(keys, d, "key", 0)
        self.v, self.z = product(values, d, "value", 0), product(values, d, "gate", 0)
        self.a, self.b = of_heads(), of_heads()
        self.q_conv, self.k_conv, self.v_conv = Taps(keys, w, dtype), Taps(keys, w, dtype), Taps(values, w, dtype)
        # As Gated DeltaNet starts: e^A_log uniform in (0, 16], softplus(dt_bias) from 0.001 to 0.1, its logarithm uniform.
        self.A_log = declare(ParamSpec((sizes.value_heads,), "scale", 0, std=1.0, law="decay"), dtype)
        self.dt_bias = declare(ParamSpec((sizes.value_heads,), "bias", 0, std=1.0, law="step"), dtype)
        self.norm = Norm(sizes.value_dim, "rmsnorm", row.norm_eps["delta_norm"], "heads", dtype, False)
        self.o = product(d, values, "attention_out", 1)
        self.enter: Callable[[Tensor], Tensor] = identity
        self.leave: Callable[[Tensor], Tensor] = identity
        self.attend: Recall = recall

    def forward(self, x: Tensor, rotary: Rotary | None, mask: AttentionMask | None) -> Tensor:
        """x [b, s, d] → [b, s, d]; of the mask it reads documents alone."""
        x = self.enter(x)
        q, k = (y.unflatten(2, (-1, self.key_dim)) for y in (self.q(x), self.k(x)))
        v, z = (y.unflatten(2, (-1, self.value_dim)) for y in (self.v(x), self.z(x)))
        own = HeadWeights(self.q_conv.weight, self.k_conv.weight, self.v_conv.weight, self.A_log, self.dt_bias)
        y = self.norm(self.attend(Streams(q, k, v, self.a(x), self.b(x)), own, mask))
        y = (y * F.silu(z.to(widest(z)))).to(x.dtype)
        return self.o.add_bias(self.leave(self.o.product(y.flatten(2))))


def widest(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def ages(documents: Tensor) -> Tensor:
    """documents [b, S] → the number of tokens of its document before each token [b, S]."""
    return torch.arange(documents.shape[1], device=documents.device) - document_starts(documents)


def after_zeros(x: Tensor, tokens: int) -> list[Tensor]:
    """A whole sequence, before which there is nothing."""
    return [F.pad(x, (0, 0, tokens, 0))]


def recall(
    x: Streams,
    own: HeadWeights,
    mask: AttentionMask | None,
    ahead: Ahead = after_zeros,
    scan: Scan = delta_rule,
    here: Callable[[Tensor], Tensor] = identity,
) -> Tensor:
    """What each head reads at each token [b, s, h, V]. `here`: the entries of a [b, S] tensor for the tokens here."""
    age = None if mask is None or mask.documents is None else here(ages(mask.documents))
    wide = widest(x.q)
    joined = torch.cat([y.flatten(2) for y in x[:3]], 2)
    q, k, v = convolved(joined, torch.cat(own[:3]), age, ahead).split([y.shape[2] * y.shape[3] for y in x[:3]], 2)
    q, k = of_length_one(q.unflatten(2, x.q.shape[2:])) * x.q.shape[3] ** -0.5, of_length_one(k.unflatten(2, x.k.shape[2:]))
    g = -own.decay.to(wide).exp() * F.softplus(x.a.to(wide) + own.step.to(wide))
    values, narrow = v.unflatten(2, x.v.shape[2:]), x.q.dtype
    return scan(q.to(narrow), k.to(narrow), values.to(narrow), g, x.b.to(wide).sigmoid(), age)


def convolved(x: Tensor, taps: Tensor, age: Tensor | None, ahead: Ahead) -> Tensor:
    """x [b, s, c] through a causal convolution of each channel, taps [c, w], within documents, then SiLU; in at least fp32."""
    wide, w = widest(x), taps.shape[1]
    taps = taps.to(wide)
    pieces = [piece.to(wide) for piece in ahead(x, w - 1)]
    total = torch.zeros((), dtype=wide, device=x.device)
    for back in range(w):
        met = [piece[:, w - 1 - back : piece.shape[1] - back] for piece in pieces]
        part = (met[0] if len(met) == 1 else torch.cat(met, 1)) * taps[:, w - 1 - back]
        total = total + (part if age is None or back == 0 else part * (age >= back).unsqueeze(2))
    return F.silu(total)


def of_length_one(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + SHORTEST)
