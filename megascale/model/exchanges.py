"""The exchanges that parallelism adds to a model, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megascale.comm.mesh import Axis
from megascale.model.attention import identity
from megascale.model.ops.attention_flex import with_blocks
from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.ops.compiled import Backend
from megascale.model.remembered import Remembered

Exchange = Callable[[Tensor], Tensor]
Pass = tuple[nn.Module, Any]  # a block and its context


def in_turn(x: Tensor, blocks: Iterable[Pass]) -> Tensor:
    """The stream [b, s, d] through blocks, one after the other."""
    for block, context in blocks:
        x = block(x, context)
    return x


@dataclass
class Exchanges:
    """The exchanges of a model outside its blocks. Passes set them; by default each is the identity.

    enter_head       the stream's tokens of all tensor ranks, before the head
    leave_embedding  sums the ranks' partial embeddings
    enter_memory     gathers the tokens of all ranks for cross-attention
    sequence_here    this rank's positions of a [b, S] tensor of whole sequences; sources by their own length
    sequence_whole   the [b, S] tensor whose positions here are a [b, s] tensor; targets' length in an encoder-decoder
    tokens_here      this tensor rank's tokens of a [b, s] tensor of these positions
    query_heads      the number of a layer's query heads → global numbers of those here
    with_blocks      adds to a mask, for sequences of a length, what FlexAttention needs on a GPU
    rows             the axis over which the rows of tables are sharded; None: unsharded
    pass_blocks      runs the stream through blocks; nested recomputation does so in groups
    loss_backend     the torch.compile backend for the loss's passes over the logits; None: eager
    remembered       what layers and stages share for a micro-batch
    """

    enter_head: Exchange = identity
    leave_embedding: Exchange = identity
    enter_memory: Exchange = identity
    sequence_here: Exchange = identity
    sequence_whole: Exchange = identity
    tokens_here: Exchange = identity
    query_heads: Callable[[int], range] = range
    with_blocks: Callable[[AttentionMask, int, torch.device], AttentionMask] = with_blocks
    rows: Axis | None = None
    pass_blocks: Callable[[Tensor, Iterable[Pass]], Tensor] = in_turn
    loss_backend: Backend | None = None
    remembered: Remembered = field(default_factory=Remembered)

    def first_row(self, rows: int | None) -> int:
        """The global number of this rank's first row of a table of `rows`."""
        return 0 if self.rows is None or rows is None else self.rows.rank * -(-rows // self.rows.size)
