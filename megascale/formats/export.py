"""The Hugging Face folder next to a kept checkpoint, `hf/step-N` in a run's directory."""

from __future__ import annotations

from pathlib import Path

import torch

from megascale.checkpoint.folders import steps_in
from megascale.files import discard
from megascale.formats.hf.model import plan_export, write_hf
from megascale.formats.sources import open_checkpoint
from megascale.formats.tokenizer_files import export_files, find_tokenizer, gather

FOLDER = "hf"


def export_beside(folder: Path, dtype: torch.dtype) -> Path:
    """Exports `checkpoints/step-N` as `hf/step-N`, its weights in `dtype`, and deletes exports of checkpoints that are gone.

    Raises UsageError if it cannot be written; then nothing is left. Reads the checkpoint's files, with memory for a few slabs.
    """
    root = folder.parent.parent / FOLDER
    target = root / folder.name
    kept = {path.name for _, path in steps_in(folder.parent)}
    for _, old in steps_in(root):
        if old.name not in kept or old == target:
            discard(old)
    checkpoint = open_checkpoint(folder)
    others = export_files(gather(find_tokenizer(checkpoint.config, folder), asked=False), checkpoint.trainer)
    return write_hf(plan_export(checkpoint, dtype), target, others=others)
