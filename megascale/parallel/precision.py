"""Computes the products of a model's layers in FP8, and gathers their weights in FP8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.comm.dtensor import is_dtensor
from megascale.config.schema import Precision
from megascale.handles import handle_of
from megascale.model.experts import Bank
from megascale.model.family import Family
from megascale.model.layers import Fp8, Linear
from megascale.model.module_metrics import ModuleMetrics
from megascale.model.spec import MATRICES
from megascale.parallel.tensor import Placement, local_tensor
from megascale.precision.fp8 import E4M3, HeldFp8, cast_losses, weight_to_fp8
from megascale.precision.watch import LOST, SUMS, shares


def products_of(precision: Precision) -> Fp8:
    """The product function of hidden layers for a precision."""
    return precision.fp8_recipe if precision.fp8 == "dynamic" else precision.fp8


def multiply_in_fp8(stage: Family, mode: Fp8) -> None:
    """Sets FP8 in every product with a hidden matrix. Embedding, head, router, gates of heads, norms and attention are unchanged."""
    for _, block in stage.units():
        for module in block.modules():
            if isinstance(module, Linear) and module.role in MATRICES:
                module.fp8 = mode
            elif isinstance(module, Bank):
                module.fp8 = mode == "static"
            else:
                continue
            if mode == "static":
                module.metrics = ModuleMetrics("fp8", SUMS, {}, shares, sampled=True)


class CastWatch:
    """Hears the losses of a product's casts and adds them to its metrics."""

    def __init__(self, metrics: ModuleMetrics) -> None:
        self.metrics = metrics

    def hear(self, about: str, *values: Tensor) -> None:
        for name, value in zip(("numbers", *LOST), values):
            self.metrics.add(f"{about}_{name}", value)


@contextmanager
def watched_casts(stages: list[Family], on: bool) -> Iterator[None]:
    """Inside the context, if `on`, every FP8 product counts cast losses. Weights are counted here by their shards.

    Compiled blocks have a second graph for it: as eager code, a watched step would need more memory than all others.
    """
    if not on:
        yield
        return
    products = [(m, CastWatch(m.metrics)) for s in stages for m in s.modules() if isinstance(m, Linear | Bank) and m.metrics is not None]
    for module, watch in products:
        weight = local_tensor(module.weight)
        watch.hear("weight", *cast_losses(weight, weight_to_fp8(weight, torch.float32)))
        module.watch = handle_of(watch)
    try:
        yield
    finally:
        for module, _ in products:
            module.watch = None


def gather_in_fp8(stage: Family, placements: dict[str, Placement]) -> None:
    """Makes FSDP2 gather the weights of static products in e4m3: half the bytes of bf16, and the same bits as casting afterwards.

    FSDP2 calls these two functions of a parameter's local tensor before and after gathering it. Weights sharded along another dimension
    than the first are gathered in the compute dtype.
    """
    for path, module in stage.named_modules():
        if isinstance(module, Linear | Bank) and module.fp8 in (True, "static"):
            weight = module.weight
            if is_dtensor(weight) and placements[f"{path}.weight"].shard_dim == 0:
                _gather_in_fp8(weight._local_tensor, tuple(weight.shape), stage.shape.compute)


def _gather_in_fp8(local: Any, shape: tuple[int, ...], compute: torch.dtype) -> None:
    def before(mesh: Any, size: Any, stride: Any, module: Any, policy: Any) -> tuple[tuple[Tensor, ...], None]:
        mine = weight_to_fp8(local, compute).view(torch.uint8)  # gloo does not support FP8
        missing = -(-shape[0] // mesh.size()) - mine.shape[0]
        padding = [0, 0] * (mine.ndim - 1) + [0, missing]
        return (F.pad(mine, padding) if missing else mine,), None

    def after(outputs: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None) -> Any:
        if out is not None:
            return None  # the same memory as before
        return HeldFp8(outputs[0][: shape[0]].view(E4M3), dtype), ()

    local.fsdp_pre_all_gather, local.fsdp_post_all_gather = before, after
