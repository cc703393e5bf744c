"""A checkpoint or a Hugging Face folder as one module in this process: tokens → logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megascale.comm.mesh import build_mesh
from megascale.config.layout import axis_sizes
from megascale.errors import UsageError
from megascale.formats import load
from megascale.formats.convert import parse_dtype
from megascale.generation.open import Opened, layout, open_any
from megascale.launch.ranks import RankInfo
from megascale.parallel.model import ParallelModel
from megascale.train.device import choose_device

FAMILIES = ("decoder", "encoder")  # families whose logits depend only on tokens


class LoadedModel(nn.Module):
    """A whole model for inference: in evaluation mode, weights without gradients."""

    def __init__(self, held: ParallelModel, opened: Opened) -> None:
        super().__init__()
        self.held, self.opened = held, opened
        self.module = held.module

    @property
    def vocab_size(self) -> int:
        return self.held.model.cfg.vocab_size or 0

    def forward(self, tokens: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """tokens [b, s] → logits [b, s, V]. Raises UsageError for tokens beyond the vocabulary."""
        tokens = torch.as_tensor(tokens, device=next(self.module.parameters()).device)
        if tokens.ndim != 2 or not tokens.numel() or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise UsageError(f"tokens are {tokens.dtype} of shape {list(tokens.shape)}: whole numbers [batch, sequence] are needed")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise UsageError(f"tokens hold {low} to {high}, and the model knows 0 to {self.vocab_size - 1}: use its own tokenizer")
        with torch.no_grad():
            logits: Tensor = self.module(tokens.to(torch.int64))
        return logits[..., : self.vocab_size]


def load_whole(path: Path, device: str, dtype: str | None) -> LoadedModel:
    """Raises UsageError if the path is no model, or its logits depend on more than tokens."""
    opened = open_any(path)
    if opened.model.family not in FAMILIES:
        raise UsageError(f"{path} is of family {opened.model.family}, but only a decoder or an encoder maps tokens to logits by itself")
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UsageError(f"{dist.get_world_size()} ranks train here, but a model is loaded whole: load it outside of the training block")
    config = layout(opened, 1, device)
    where = choose_device(config, RankInfo())
    mesh = build_mesh(axis_sizes(config.parallel, 1), where.type)
    computed = parse_dtype(dtype) or opened.dtype
    return LoadedModel(
        load.load_model(config.model, opened.seq_len, opened.produce, mesh, config.parallel, where, computed, opened.fp8), opened
    )
