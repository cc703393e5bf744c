"""Both ends of a text model: tables of vocabulary and positions, and BERT's layers before its head.

Shapes: b micro-batch, s sequence, d hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.comm.mesh import Axis
from megascale.config.schema import Model
from megascale.model.activations import activation
from megascale.model.layers import Linear, Norm
from megascale.model.spec import ParamSpec, declare


class Table(nn.Module):
    """A bare weight with a name: rows of the vocabulary or of positions. `shadow` as in `Linear`."""

    def __init__(self, spec: ParamSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = declare(spec, dtype)
        self.rows = spec.shape[0]  # rows of the whole table
        self.vocabulary = spec.role in ("embedding", "head")
        self.shadow: Tensor | None = None

    def forward(self) -> Tensor:
        """The weight, asked for as a module's result: FSDP gathers it then."""
        return self.weight


def rows_of(weight: Tensor, tokens: Tensor, first: int, axis: Axis | None) -> Tensor:
    """Rows of weight [V_here, d] for tokens [b, s] → [b, s, d]. With an axis the first row has the global number `first`, and rows on other
    ranks are zero.
    """
    if axis is None:
        return F.embedding(tokens, weight)
    row = tokens - first
    here = (row >= 0) & (row < weight.shape[0])
    return F.embedding(row.where(here, row.new_zeros(())), weight) * here.unsqueeze(-1).to(weight.dtype)


class MaskedHead(nn.Module):
    """BERT's layers between its last block and the product with the table: N(φ(W·x + b)), with φ the feed-forward's activation (GELU if
    that is gated); and a bias per token for that product. Every tensor rank has all of it except the bias, and applies it to its own
    tokens.
    """

    bias: Tensor | None

    def __init__(self, cfg: Model, std: float, dtype: torch.dtype) -> None:
        super().__init__()
        assert cfg.vocab_size is not None
        d, self.activation = cfg.hidden_size, activation("gelu" if cfg.gated else cfg.ffn)
        self.dense = Linear(d, d, "head", "tokens", std, dtype, cfg.bias)
        self.norm = Norm(d, cfg.norm, cfg.eps_of("mlm_norm"), "tokens", dtype, cfg.bias, cfg.dyt_alpha[1])
        self.bias = declare(ParamSpec((cfg.vocab_size,), "bias", 0), dtype) if cfg.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, d] → [b, s, d]"""
        return self.norm(self.activation(self.dense(x)))  # type: ignore[no-any-return]
