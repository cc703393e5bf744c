"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): module k looks one token further than the one before it.

At position i module k joins the normalized stream with the normalized embedding of token i + k, passes the result through a block of its
own and, through the model's own head, predicts token i + k + 1. Tables are shared with the model.

Shapes: b micro-batch, S whole sequence, s tokens here, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from megascale.config.schema import Model
from megascale.handles import handle_of
from megascale.model.auxiliary import ride_on
from megascale.model.block import Block, Context
from megascale.model.exchanges import Exchanges
from megascale.model.layers import Linear, Norm
from megascale.model.module_metrics import ModuleMetrics, Totals
from megascale.model.residual import Stack, residual
from megascale.model.tables import Table


class Ahead(nn.Module):
    """One module: N_h(stream) and N_e(embedding) joined by a product [d, 2d], a block like the last one, and a norm before the head."""

    def __init__(self, cfg: Model, stack: Stack, dtype: torch.dtype, sparse: bool, number: int) -> None:
        super().__init__()
        last = cfg.num_layers - 1
        own, d = cfg.at_layer(last), cfg.hidden_size
        row = residual(own, stack, last)

        def norm(name: str) -> Norm:
            return Norm(d, cfg.norm, cfg.eps_ahead(number, name), "tokens", dtype, cfg.bias, cfg.dyt_alpha[1])

        self.hidden_norm, self.token_norm = norm("hidden_norm"), norm("token_norm")
        std = row.starts.std("up", d, 2 * d)
        self.join = Linear(d, 2 * d, "up", "tokens", std, dtype, scale=row.product_scale(2 * d))
        self.block = Block(own, row, stack, dtype, sparse)
        self.norm = norm("norm")
        self.handle = handle_of(self)  # of what hears about a micro-batch
        self.metrics = ModuleMetrics("mtp", {"loss": 1, "tokens": 1, "accepted": 1, "drafts": 1}, {}, _read)

    def forward(self, x: Tensor, tokens: Tensor, context: Context) -> Tensor:
        """x [b, s, d], embedded tokens [b, s, d] → the stream of the next module [b, s, d]."""
        return self.block(self.joined(x, tokens), context)  # type: ignore[no-any-return]

    def joined(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Both [b, s, d], normalized, through the product."""
        return self.join(torch.cat((self.hidden_norm(x), self.token_norm(tokens)), -1))  # type: ignore[no-any-return]

    def hear(self, about: str, *values: Tensor) -> None:
        """Adds a micro-batch's summed loss, and the number of tokens that it predicted."""
        for name, value in zip(("loss", "tokens"), values):
            self.metrics.add(name, value)


def _read(totals: Totals) -> dict[str, float]:
    """Cross-entropy per token that the module predicted, and after an evaluation the share of its tokens that speculation would accept."""
    read = {"loss": float(totals["loss"] / totals["tokens"].clamp(min=1))}
    if totals.get("drafts"):
        read["acceptance"] = float(totals["accepted"] / totals["drafts"])
    return read


def shifted(x: Tensor, by: int, beyond: int) -> Tensor:
    """x [b, S] moved to the left by `by` places, with `beyond` where nothing is left."""
    return torch.cat((x[:, by:], x.new_full((x.shape[0], min(by, x.shape[1])), beyond)), 1)


def targets_ahead(targets: Tensor, documents: Tensor | None, by: int) -> Tensor:
    """targets [b, S] of the next token → of the token `by` places after it, −1 where that is not counted or in another document."""
    found = shifted(targets, by, -1)
    return found if documents is None else found.where(shifted(documents, by, -1) == documents, -1)


class Looking(Protocol):
    """What multi-token prediction needs of its model."""

    cfg: Model
    mtp: nn.ModuleDict
    embedding: Table
    exchanges: Exchanges

    def embedded(self, tokens: Tensor, table: Table) -> Tensor: ...

    def enter_head(self, x: Tensor) -> Tensor: ...

    def likeliest(self, x: Tensor, head: Tensor) -> Tensor: ...

    def loss_of(self, x: Tensor, head: Tensor, targets: Tensor, scale: float) -> Tensor: ...


def ahead_of(model: Looking, x: Tensor, tokens: Tensor, contexts: Iterator[Context]) -> Iterator[tuple[int, Ahead, Tensor]]:
    """A model's predictions on the stream before its head x [b, s, d] of tokens [b, S]: each module's number, from 1, the module, and the
    head's input [b, s, d].
    """
    for number, (ahead, context) in enumerate(zip(model.mtp.values(), contexts), 1):
        assert isinstance(ahead, Ahead)
        x = ahead(x, model.embedded(shifted(tokens, number, 0), model.embedding), context)
        yield number, ahead, model.enter_head(ahead.norm(x))


def look_ahead(
    model: Looking,
    x: Tensor,
    head: Tensor,
    tokens: Tensor,
    targets: Tensor,
    documents: Tensor | None,
    contexts: Iterator[Context],
    scale: float,
) -> Tensor:
    """The stream before the head x [b, s, d], unchanged, with the losses of multi-token prediction on it. `head`: the head's weight."""
    stream = x
    for number, ahead, predicting in ahead_of(model, stream, tokens, contexts):
        wanted = model.exchanges.sequence_here(targets_ahead(targets, documents, number)).flatten()
        loss = model.loss_of(predicting, head, wanted, scale)
        x = ride_on(x, loss, model.cfg.mtp_weight / len(model.mtp), ahead.handle, (loss.detach() / scale, (wanted >= 0).sum()))
    return x


def count_accepted(
    model: Looking, x: Tensor, head: Tensor, tokens: Tensor, targets: Tensor, documents: Tensor | None, contexts: Iterator[Context]
) -> Tensor:
    """In evaluation, the stream before the head x [b, s, d], unchanged. Each module hears for how many of the tokens that it predicts
    greedy speculation would accept its own: the model itself, given the tokens before, finds the same one likeliest.
    """
    exchanges = model.exchanges
    own = exchanges.sequence_whole(model.likeliest(model.enter_head(x), head))
    for number, ahead, predicting in ahead_of(model, x, tokens, contexts):
        counted = exchanges.sequence_here(targets_ahead(targets, documents, number)) >= 0
        same = model.likeliest(predicting, head) == exchanges.sequence_here(shifted(own, number, -1))
        ahead.metrics.add("accepted", (same & counted).sum())
        ahead.metrics.add("drafts", counted.sum())
    return x
