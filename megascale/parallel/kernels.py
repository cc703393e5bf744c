"""Replaces torch's implementation of an operation in a model's modules."""

from __future__ import annotations

from functools import partial

from torch import nn

from megascale.model.attention_delta import recall
from megascale.model.family import Family
from megascale.model.layers import Norm
from megascale.model.norms import NormKernel
from megascale.model.ops.delta_kernel import Rule


def call_norm_kernel(stage: nn.Module, kernel: NormKernel) -> None:
    """Makes every norm call `kernel`, from `choose_kernels`. Norms over a sharded dimension are left out: no kernel supports them."""
    for module in stage.modules():
        if isinstance(module, Norm):
            module.kernel = kernel


def call_rule(stage: Family, rule: Rule) -> None:
    """Makes linear attention call `rule`, from `choose_rule`, where a rank has whole sequences; rings pass states by our own."""
    for _, block in stage.units():
        if block.cfg.attention_row.scans:
            block.attention.attend = partial(recall, scan=rule)
