"""What parallelism does to the tensors of a model, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megascale.comm.mesh import Axis
from megascale.model.attention import identity

Exchange = Callable[[Tensor], Tensor]
Pass = tuple[nn.Module, Any]  # a block and its context


def in_turn(x: Tensor, blocks: Iterable[Pass]) -> Tensor:
    """The stream [b, s, d] through blocks, one after the other."""
    for block, context in blocks:
        x = block(x, context)
    return x


@dataclass
class Exchanges:
    """The exchanges of a model outside its blocks. Passes set them; by default each is the identity, as on one rank.

    enter_head       the stream's tokens of all tensor ranks, before the head
    leave_embedding  the sum of the ranks' partial embeddings
    enter_memory     the tokens of all ranks, where blocks attend to another stack's
    sequence_here    a [b, S] tensor of whole sequences cut to the positions that this rank holds; sources by their own length
    tokens_here      a [b, s] tensor of these positions cut to the tokens of this tensor rank
    heads            the first query head here and the one behind the last, by global number
    rows             the axis over whose ranks the rows of tables are cut; None: all rows are here
    pass_blocks      the stream through blocks, which nested recomputation does in groups
    compiled_loss    the loss's passes over the logits are compiled
    """

    heads: tuple[int, int]
    enter_head: Exchange = identity
    leave_embedding: Exchange = identity
    enter_memory: Exchange = identity
    sequence_here: Exchange = identity
    tokens_here: Exchange = identity
    rows: Axis | None = None
    pass_blocks: Callable[[Tensor, Iterable[Pass]], Tensor] = in_turn
    compiled_loss: bool = False

    def first_row(self, rows: int | None) -> int:
        """The global number of this rank's first row of a table of `rows`."""
        return 0 if self.rows is None or rows is None else self.rows.rank * -(-rows // self.rows.size)

    @property
    def num_heads(self) -> int:
        """Query heads here."""
        return self.heads[1] - self.heads[0]
