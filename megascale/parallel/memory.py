"""Recomputation and compilation: both replace a block's forward in place, so names and hooks stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megascale.model.decoder import Decoder
from megascale.model.families import Family

aten = torch.ops.aten
# What selective recomputation keeps: results of products and of attention, where nearly all time goes. Norms, activations and rotations
# are cheap to do again, and they are what fills memory.
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
    torch.ops.higher_order.flex_attention,
}


def recompute_blocks(model: Family, mode: str) -> None:
    """`none`, `selective` or `full` (only a block's input is kept)."""
    if mode == "none":
        return
    contexts: Callable[[], Any] | None = None
    if mode == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _policy)
    for _, block in model.units():
        # Dropout masks are hashes, not draws: there is no generator state to restore.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if contexts is not None:
            options["context_fn"] = contexts
        block.forward = partial(checkpoint, block.forward, **options)  # type: ignore[method-assign]


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(model: Family) -> None:
    """Blocks share one compiled graph; exchanges between ranks stay outside it. On devices the loss has one of its own."""
    if isinstance(model, Decoder):
        model.compiled_loss = True
    for _, block in model.units():
        block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
