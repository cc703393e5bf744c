"""A rank's rectangle of a global tensor: the common form of tensors between layouts, weights and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Piece:
    """One rank's part of a tensor.

    shape   the whole, unsharded tensor's shape (without padding)
    offset  where `local` begins in it, one index per dimension
    local   this rank's data, inside `shape`; empty if the rank holds nothing. It may be a view of live training state:
            writing into it changes the state.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    local: torch.Tensor

    @property
    def whole(self) -> bool:
        """Whether this rank holds the whole tensor."""
        return tuple(self.local.shape) == self.shape


def chunk_bounds(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """First and past-the-last index of `rank`'s chunk of `size` entries (`torch.chunk` semantics, as FSDP2 shards dimension 0)."""
    step = -(-size // ranks)
    return min(rank * step, size), min((rank + 1) * step, size)
