"""Checkpoints for inference with hidden matrices in e4m3: the same bits as static FP8 products cast from the masters, in a quarter of the
space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megascale.checkpoint.streaming import Target
from megascale.errors import UsageError
from megascale.formats.shapes import MODEL, our_specs
from megascale.formats.sources import OpenCheckpoint, StoredTensors
from megascale.formats.tensor_maps import Sizes
from megascale.model.spec import MATRICES
from megascale.precision.fp8 import E4M3, weight_to_fp8


@dataclass(frozen=True)
class Narrowed:
    """A `ReadSlice` of weights as a forward pass uses them: `matrices` in e4m3, the rest in the compute dtype, states unchanged."""

    source: StoredTensors
    dtypes: dict[str, torch.dtype]
    compute: torch.dtype

    def __call__(self, name: str, offset: Sizes, shape: Sizes) -> Tensor:
        x, dtype = self.source.read(name, offset, shape), self.dtypes[name]
        return weight_to_fp8(x, self.compute) if dtype == E4M3 else x.to(dtype)


@dataclass(frozen=True)
class Inference:
    """A planned checkpoint: tensors, how to make them, and trainer.json."""

    targets: list[Target]
    produce: Narrowed
    trainer: dict[str, Any]


def plan_inference(checkpoint: OpenCheckpoint) -> Inference:
    """Raises UsageError for a model that was not trained with static FP8, whose products would not be the trainer's."""
    section = checkpoint.config.get("precision")
    precision = section if isinstance(section, dict) else {}
    if precision.get("fp8") != "static":
        raise UsageError(
            f"--dtype is fp8 but {checkpoint.folder} was trained with precision.fp8 {precision.get('fp8', 'false')}: weights in e4m3 are "
            "what precision.fp8 static computes with, and would be another model here; give --dtype bf16"
        )
    compute = torch.bfloat16 if precision.get("compute") == "bf16" else torch.float32
    dtypes = {}
    for name, spec in our_specs(checkpoint.model, checkpoint.seq_len).items():
        stored = checkpoint.source.tensors[MODEL + name].dtype
        narrow = E4M3 if spec.role in MATRICES else compute
        dtypes[MODEL + name] = stored if spec.role == "coefficient" else narrow
    targets = [Target(n, d, checkpoint.source.tensors[n].shape) for n, d in dtypes.items()]
    trainer = {**checkpoint.trainer, "converted": {"from": "megascale", "path": str(checkpoint.folder), "weights": "e4m3"}}
    return Inference(targets, Narrowed(checkpoint.source, dtypes, compute), trainer)
