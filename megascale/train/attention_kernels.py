"""Which kernels a run's attention takes, as model/attention.py and parallel/ring.py choose them: for the log."""

from __future__ import annotations

import torch

from megascale.config.schema import Config, Model
from megascale.model.ops import attention_flex
from megascale.model.ops.attention_cpu import LONGEST
from megascale.model.ops.attention_fused import has_kernel
from megascale.model.ops.attention_tiles import AttentionMask
from megascale.model.shape import DTYPES
from megascale.train.gpu import gpu_facts

FLEX, TILES = "FlexAttention", "tiles in plain torch"


def attention_kernels(config: Config, device: torch.device) -> str:
    """The kernels of all kinds of layers with a score per pair of tokens, in words."""
    found = dict.fromkeys(_kernel(m, config, device) for m in config.model.variants.values() if not m.attention_row.scans)
    return " and ".join(found)


def _kernel(m: Model, config: Config, device: torch.device) -> str:
    """The kernel of a training step in layers with the config `m`."""
    if not m.attention_row.options:
        return f"its own kernels ({m.attention})"
    if m.position_row.distances:
        capped = m.attention_softcap is not None or m.attention_sink is not None
        return "torch with whole scores" if capped else "torch with dense biases"
    there = torch.empty(0)
    documents, slopes = (there if x else None for x in (config.train.packing == "documents", m.position_row.slopes))
    mask = AttentionMask(m.causal, documents, m.sliding_window, slopes, softcap=m.attention_softcap)
    ring = config.parallel.cp > config.parallel.heads_over
    cpu, dtype = device.type == "cpu", DTYPES[config.precision.compute]
    kernel = has_kernel(device, dtype, m.head_width)
    sinks = m.attention_sink is not None
    if mask.fused and (kernel or not (ring or sinks)):
        return _fused(m, config, device, ring)
    if cpu or (ring and ((mask.fused and not sinks) or not attention_flex.takes_merged())):
        return TILES
    if not m.causal and mask.softcap is None and not ring:
        return "torch with whole scores" if sinks else "torch with dense masks"
    return FLEX


def _fused(m: Model, config: Config, device: torch.device, ring: bool) -> str:
    """The kernel where nothing but order decides which keys are seen."""
    merged = ring or m.attention_sink is not None
    if device.type == "cpu":
        quick = m.causal and not merged and config.train.seq_len <= LONGEST
        return "blocks of torch products" if quick else "torch's flash kernel"
    if not has_kernel(device, DTYPES[config.precision.compute], m.head_width):
        return "torch's kernels for this dtype and head size"
    return {"cudnn": "cuDNN", "flash": "FlashAttention-2"}[gpu_facts(device)["attention"]]
