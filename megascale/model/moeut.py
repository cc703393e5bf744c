"""MoEUT: a group of layers whose weights repeat in depth, with experts in attention as well (Csordás et al., arXiv 2405.16039).

The stream is normalized only before a softmax or sigmoid: queries, keys and selectors read N(x), values and experts the raw x, so that
every repeat adds to the stream at its own size. Selectors are sigmoids whose k largest scores are the gates, without normalization.

Shapes: b micro-batch, s sequence, T = b·s tokens, d hidden, h heads, e head size, E experts per head, k chosen ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.model.attention import Attend, attend, identity
from megascale.model.block import Context
from megascale.model.experts import Bank, ExpertInit, MixtureOfExperts, spread_through
from megascale.model.family import Unit
from megascale.model.layers import Linear, Norm, dropout
from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.ops.matmul import weighted_sum
from megascale.model.position import Rotary, rotate
from megascale.model.residual import InitStd, Residual
from megascale.model.router import Choice, choose, entropy_of, mass_of, sigma
from megascale.model.spec import ParamSpec, declare, declare_repeated


class Masses(NamedTuple):
    """Summed probabilities of the experts in one pass through a layer: feed-forward [b, E], values and outputs [b, h, E]."""

    ffn: Tensor
    value: Tensor
    out: Tensor


class SwitchHead(nn.Module):
    """Attention with dense queries and keys, and for every head a choice among experts for its values and its output product
    (arXiv 2312.07987).
    """

    def __init__(self, cfg: Model, std: float, dtype: torch.dtype) -> None:
        super().__init__()
        ut = cfg.moeut
        assert ut is not None
        d, e, h, n = cfg.hidden_size, cfg.head_dim, cfg.num_heads, ut.attention_experts
        self.heads, self.experts, self.top_k, self.head_dim = h, n, ut.attention_top_k, e  # `heads` counts those of all tensor ranks
        self.interleaved = cfg.rope_interleaved
        uses, wide = ut.attention_top_k / n, std / math.sqrt(d)
        self.q = Linear(h * e, d, "query", 0, wide, dtype)
        self.k = Linear(h * e, d, "key", 0, wide, dtype)
        self.v = Bank(ParamSpec((h * n, e, d), "value", 0, wide, uses=uses), dtype)
        self.o = Bank(ParamSpec((h * n, d, e), "attention_out", 0, std / math.sqrt(h * e), uses=uses), dtype)
        self.value_selector = declare(ParamSpec((h * n, d), "router", 0, wide, equal_rows=True), dtype)
        self.out_selector = declare(ParamSpec((h * n, d), "router", 0, wide, equal_rows=True), dtype)
        self.attend: Attend = attend
        self.enter: Callable[[Tensor], Tensor] = identity
        self.leave: Callable[[Tensor], Tensor] = identity
        self.over_sequence: Callable[[Tensor], Tensor] = identity

    def forward(self, x: Tensor, norm: Norm, rotary: Rotary | None, mask: AttentionMask | None) -> tuple[Tensor, Choice, Choice]:
        """x [b, s, d] → [b, s, d] and the choices [b, s, h, …] of experts for values and outputs, for the local heads and tokens."""
        x = self.enter(x)
        normed = norm(x)
        q, k = (part(normed).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in (self.q, self.k))
        if rotary is not None:
            # Half of a head has positions. The paper scales queries and keys by e^(−1/4) each, `attend` by e^(−1/2) together.
            q, k = (rotate(x, c, s, self.interleaved) for x, c, s in ((q, *rotary[:2]), (k, *rotary[2:])))
        into, out = self._choose(normed, self.value_selector), self._choose(normed, self.out_selector)
        v = self._values(x, into).transpose(1, 2)
        return self.leave(self._outputs(self.attend(q, k, v, mask).transpose(1, 2), out)), into, out

    def _choose(self, normed: Tensor, selector: Tensor) -> Choice:
        exact = torch.promote_types(normed.dtype, torch.float32)
        logits = F.linear(normed.to(exact), selector.to(normed.dtype).to(exact)).unflatten(2, (-1, self.experts))
        return choose(sigma, logits, self.top_k, None)

    def _values(self, x: Tensor, choice: Choice) -> Tensor:
        """[b, s, d] → [b, s, h, e]: each head's chosen experts on the token, weighted."""
        results = spread_through(self.v, x.flatten(0, 1), self._numbers(choice).flatten(2).flatten(0, 1))
        gates = choice.gates.flatten(0, 1).to(x.dtype)
        return weighted_sum(gates, results.unflatten(1, (-1, self.top_k))).unflatten(0, x.shape[:2])

    def _outputs(self, y: Tensor, choice: Choice) -> Tensor:
        """[b, s, h, e] → [b, s, d]: each head's chosen experts on its result, weighted and summed over heads."""
        results = spread_through(self.o, y.flatten(0, 2), self._numbers(choice).flatten(0, 2))
        gates = choice.gates.flatten(0, 2).to(y.dtype)
        return weighted_sum(gates, results).unflatten(0, y.shape[:3]).sum(2)

    def _numbers(self, choice: Choice) -> Tensor:
        """Experts counted within a head → among all."""
        first = torch.arange(choice.experts.shape[2], device=choice.experts.device) * self.experts
        return choice.experts + first.unsqueeze(-1)


class RepeatedBlock(Unit):
    """One layer of the group: SwitchHead attention, then σ-MoE, each added to the stream."""

    def __init__(self, cfg: Model, dtype: torch.dtype) -> None:
        super().__init__()
        assert cfg.moe is not None
        self.cfg, self.dropout, d, moe = cfg, cfg.dropout, cfg.hidden_size, cfg.moe
        std = math.sqrt(2 / cfg.num_layers)
        assert moe.ffn_size is not None
        # Norms come after the exchange that gives tensor ranks the stream, since values and experts need it unnormalized: one exchange
        # serves both, and each rank's gradient of a norm is that of its own heads and experts.
        self.attention_norm = Norm(d, cfg.norm, cfg.norm_eps, "heads", dtype, cfg.bias)
        self.attention = SwitchHead(cfg, std, dtype)
        self.ffn_norm = Norm(d, cfg.norm, cfg.norm_eps, "heads", dtype, cfg.bias)
        wide = std / math.sqrt(d)
        start = ExpertInit({"router": wide, "up": wide, "gate": wide, "down": std / math.sqrt(moe.num_experts * moe.ffn_size)})
        self.ffn = MixtureOfExperts(cfg, Residual(cfg.residual_row, InitStd("constant", cfg.init_std)), dtype, start)
        if moe.balance == "entropy":
            self.ffn.balance_weight = 0.0  # the entropy loss covers all repeats
        assert cfg.moeut is not None
        declare_repeated(self, cfg.num_layers // cfg.moeut.group_size)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Masses | None]:
        """x [b, s, d] → [b, s, d], and the experts' masses if they are counted."""
        keys, loss_weights = context.keys, context.loss_weights
        y, into, out = self.attention(x, self.attention_norm, context.rotary, context.mask)
        x = x + dropout(y, self.dropout, keys)
        entered = self.ffn.enter(x)
        y, choice = self.ffn.chosen_by(self.ffn_norm(entered), entered, loss_weights)
        x = x + dropout(self.ffn.leave(y), self.dropout, None if keys is None else ~keys)
        if loss_weights is None:
            return x, None
        ffn, value, out_mass = (
            mass_of(c.probabilities, of.to(c.probabilities.dtype))
            for c, of in ((choice, self.ffn.loss_weights_here(loss_weights)), (into, loss_weights), (out, loss_weights))
        )
        return x, Masses(ffn, value, out_mass)

    @property
    def sublayers(self) -> list[Any]:
        return [self.attention, self.ffn]


def repeats_loss(masses: list[Masses], block: RepeatedBlock, ffn_weight: float, attention_weight: float) -> Tensor:
    """One layer's entropy losses over all its repeats, 0-dim: for its feed-forward, and for its values and outputs (the mean over heads).

    Ranks with the same tokens take equal shares of the first; of the others each takes those of its own heads.
    """
    ffn, value, out = (torch.stack(parts).sum(0) for parts in zip(*masses))
    attention = block.attention
    of_heads = entropy_of(value.flatten(0, 1), attention.over_sequence) + entropy_of(out.flatten(0, 1), attention.over_sequence)
    of_ffn = entropy_of(ffn, block.ffn.over_sequence) / block.ffn.copies
    return (ffn_weight * of_ffn + attention_weight * of_heads / attention.heads) / len(masses)
