"""Recomputation and compilation: both replace a block's forward in place, so names and hooks do not change."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megascale.model.exchanges import Pass, in_turn
from megascale.model.family import Family
from megascale.model.ops.compiled import compile_static

aten = torch.ops.aten
# Selective recomputation keeps the results of products and of attention, which take nearly all time. Norms, activations and rotations are
# cheap to recompute, and they fill the memory.
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._grouped_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.megascale.masked_attention.default,
    torch.ops.megascale.fp8_product.default,
    torch.ops.megascale.product.default,
    torch.ops.megascale.product_by_expert.default,
    torch.ops.higher_order.flex_attention,
}


# Dropout masks are hashes, not draws: there is no generator state to restore.
PLAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


def recompute_blocks(model: Family, mode: str) -> None:
    """`none`, `selective`, `full` (only a block's input is kept) or `nested` (every √n-th input, and those of one group at a time)."""
    if mode == "none":
        return
    options = PLAIN
    if mode == "selective":
        options = PLAIN | {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
    for _, block in model.units():
        block.forward = partial(checkpoint, block.forward, **options)  # type: ignore[method-assign]
    if mode == "nested":
        model.exchanges.pass_blocks = in_groups


def in_groups(x: Tensor, blocks: Iterable[Pass]) -> Tensor:
    """`in_turn`, recomputed in ⌈√n⌉ groups (Chen et al., arXiv 1604.06174, section 4): backward runs a group forward again for its blocks'
    inputs, and each block for its intermediates. n blocks keep about 2√n inputs and cost two more forwards.
    """
    passes = list(blocks)
    size = group_size(len(passes))
    for begin in range(0, len(passes), size):
        x = checkpoint(in_turn, x, passes[begin : begin + size], **PLAIN)
    return x


def group_size(blocks: int) -> int:
    """Blocks per group, ⌈√n⌉, so that the number of groups differs by at most one."""
    return max(1, math.isqrt(blocks - 1) + 1) if blocks else 1


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(model: Family) -> None:
    """Blocks share one compiled graph; exchanges between ranks stay outside it. A loss over an unsharded vocabulary has its own graph."""
    model.exchanges.compiled_loss = True
    for _, block in model.units():
        block.forward = compile_static(block.forward)  # type: ignore[method-assign]
