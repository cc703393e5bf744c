"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): module k looks one token further than the one before it.

At position i module k joins the normalized stream with the normalized embedding of token i + k, passes the result through a block of its
own and, through the model's own head, predicts token i + k + 1. Tables are shared with the model.

Shapes: b micro-batch, S whole sequence, s tokens here, d hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.handles import handle_of
from megascale.model.block import Block, Context
from megascale.model.layers import Linear, Norm
from megascale.model.module_metrics import ModuleMetrics, Totals
from megascale.model.residual import Stack, residual


class Ahead(nn.Module):
    """One module: N_h(stream) and N_e(embedding) joined by a product [d, 2d], a block like the last one, and a norm before the head."""

    def __init__(self, cfg: Model, stack: Stack, dtype: torch.dtype, sparse: bool) -> None:
        super().__init__()
        last = cfg.num_layers - 1
        own, d = cfg.at_layer(last), cfg.hidden_size
        row = residual(own, stack, last)

        def norm() -> Norm:
            return Norm(d, cfg.norm, cfg.eps_of("final_norm"), "tokens", dtype, cfg.bias, cfg.dyt_alpha[1])

        self.hidden_norm, self.token_norm = norm(), norm()
        std = row.starts.std("up", d, 2 * d)
        self.join = Linear(d, 2 * d, "up", "tokens", std, dtype, scale=row.product_scale(2 * d))
        self.block = Block(own, row, stack, dtype, sparse)
        self.norm = norm()
        self.handle = handle_of(self)  # of what hears about a micro-batch
        self.metrics = ModuleMetrics("mtp", {"loss": 1, "tokens": 1}, {}, _mean_loss)

    def forward(self, x: Tensor, tokens: Tensor, context: Context) -> Tensor:
        """x [b, s, d], embedded tokens [b, s, d] → the stream of the next module [b, s, d]."""
        return self.block(self.join(torch.cat((self.hidden_norm(x), self.token_norm(tokens)), -1)), context)  # type: ignore[no-any-return]

    def hear(self, about: str, *values: Tensor) -> None:
        """Adds a micro-batch's summed loss, and the number of tokens that it predicted."""
        for name, value in zip(("loss", "tokens"), values):
            self.metrics.add(name, value)


def _mean_loss(totals: Totals) -> dict[str, float]:
    """Cross-entropy per token that the module predicted."""
    return {"loss": float(totals["loss"] / totals["tokens"].clamp(min=1))}


def shifted(x: Tensor, by: int, beyond: int) -> Tensor:
    """x [b, S] moved to the left by `by` places, with `beyond` where nothing is left."""
    return torch.cat((x[:, by:], x.new_full((x.shape[0], min(by, x.shape[1])), beyond)), 1)


def targets_ahead(targets: Tensor, documents: Tensor | None, by: int) -> Tensor:
    """targets [b, S] of the next token → of the token `by` places after it, −1 where that is not counted or in another document."""
    found = shifted(targets, by, -1)
    return found if documents is None else found.where(shifted(documents, by, -1) == documents, -1)
