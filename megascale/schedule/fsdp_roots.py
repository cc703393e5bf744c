"""A rank's stages under FSDP2: by default each is a root with its own streams, buffers and order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, share_comm_ctx


def share_buffers(stages: Sequence[nn.Module]) -> None:
    """Shares streams and reduction buffers between all stages. Otherwise every root keeps the unsharded gradient that it reduced last until
    its step ends, which under layered accumulation adds up to a copy of the whole model's gradient.
    """
    share_comm_ctx([s for s in stages if isinstance(s, FSDPModule)])


def forget_order(stage: nn.Module) -> None:
    """Call after a forward pass of a stage that shares buffers. In backward FSDP2 would prefetch what ran before it, maybe of another
    stage, by positions in an order that the first stage to finish clears. Our schedules decide what is gathered when.
    """
    for group in param_groups(stage):
        group._post_forward_indices.clear()


def param_groups(stage: nn.Module) -> Iterator[Any]:
    """FSDP2's parameter groups in a stage; none if it is not sharded."""
    if isinstance(stage, FSDPModule):
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                state = fully_shard.state(module)  # type: ignore[attr-defined]
                groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
                yield from (g for g in groups if g is not None)
