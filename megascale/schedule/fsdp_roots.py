"""A rank's stages as FSDP2 sees them: each a root of its own, with streams, buffers and an order of its own, unless told otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, share_comm_ctx


def share_buffers(stages: Sequence[nn.Module]) -> None:
    """One set of streams for all, and of what a reduction has been given: alone, every root keeps the unsharded gradient that it reduced
    last until it is told that its step has ended, which under layered accumulation is a copy of the whole model's gradient.
    """
    share_comm_ctx([s for s in stages if isinstance(s, FSDPModule)])


def forget_order(stage: nn.Module) -> None:
    """After a forward pass of a stage that shares: in backward FSDP2 would gather ahead what ran before it, maybe of another stage, by
    places in an order that the first stage to end clears. Our schedules say themselves what is gathered when.
    """
    for group in param_groups(stage):
        group._post_forward_indices.clear()


def param_groups(stage: nn.Module) -> Iterator[Any]:
    """FSDP2's groups of weights in a stage; none where it is not sharded."""
    if isinstance(stage, FSDPModule):
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                state = fully_shard.state(module)  # type: ignore[attr-defined]
                groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
                yield from (g for g in groups if g is not None)
