"""A pretrained model for growing and shrinking: config, index, and rectangles of its tensors. Opening it reads no weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale.checkpoint.index import DTYPES, TRAINER, Index, read_index
from megascale.checkpoint.loader import find, verify
from megascale.checkpoint.shards import read_slice
from megascale.checkpoint.trainer import read_trainer
from megascale.config.load import build_config
from megascale.config.schema import Config, Model
from megascale.errors import UsageError
from megascale.expand.stack import specs
from megascale.formats.shapes import check_depth


@dataclass(frozen=True)
class GrowthSource:
    """An opened checkpoint; `trainer` is its trainer.json."""

    index: Index
    config: Config
    trainer: dict[str, Any]

    @property
    def model(self) -> Model:
        return self.config.model

    @property
    def seq_len(self) -> int:
        return self.config.train.seq_len

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most stored weights."""
        kinds = [t.dtype for n, t in self.index.tensors.items() if n.startswith("model.")]
        return DTYPES[max(set(kinds), key=kinds.count)]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the model's tensors by name."""
        return {n.removeprefix("model."): t.shape for n, t in self.index.tensors.items() if n.startswith("model.")}

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        return read_slice(self.index, f"model.{name}", offset, shape)


def open_source(path: str | Path, check: bool = True) -> GrowthSource:
    """A step folder or a run. Raises UsageError if it is not a whole checkpoint of a model; `check` reads all files for their checksums."""
    folder = find(path)
    index = read_index(folder)
    trainer = read_trainer(folder)
    converted = trainer.get("converted", {})
    if converted.get("weights") == "e4m3":
        raise UsageError(
            f"{folder} is for inference, with hidden matrices in e4m3, and its masters are gone: give the run it was converted from, "
            f"{converted.get('path')}"
        )
    if not isinstance(trainer.get("config"), dict):
        raise UsageError(
            f"{folder / TRAINER} holds no config: growing and shrinking start from checkpoints of megascale train, convert, or their own"
        )
    # A converted checkpoint knows its model and context; the user must set everything else that a run needs.
    train = trainer["config"].get("train", {})
    if not isinstance(train, dict):
        raise UsageError(f"{folder / TRAINER} says train is {train!r}: the checkpoint is damaged, use an older one")
    values = {**trainer["config"], "train": {"steps": 1, **train}}
    if train.get("tokens") is not None:
        del values["train"]["steps"]
    config = build_config({"data": {"train": "-"}, **values}, trainer.get("plugins", {}))
    source = GrowthSource(index, _without_runs(config), trainer)
    if source.model.vocab_size is None and source.model.spacetime is None:
        raise UsageError(f"{folder / TRAINER} does not say model.vocab_size: the checkpoint is damaged, use an older one")
    check_depth(source.model, len(source.shapes), str(folder / TRAINER))
    expected = {n: s.shape for n, s in specs(source.model, source.seq_len).items()}
    have = source.shapes
    for name, shape in expected.items():
        if have.get(name) != shape:
            what = "is not stored" if name not in have else f"has shape {list(have[name])} in the index"
            raise UsageError(f"{folder} is not whole: model.{name} {what} and its config gives {list(shape)}; use another checkpoint")
    for name, entry in index.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry.bytes:
            size = f"has {file.stat().st_size} bytes" if file.is_file() else "is missing"
            raise UsageError(f"{folder} is not whole: {file} {size} but the index says {entry.bytes}; use another checkpoint")
    if check and (problems := verify(index)):
        raise UsageError(f"{folder} is not whole: {'; '.join(problems)}; use another checkpoint")
    return source


def _without_runs(config: Config) -> Config:
    """The config without keys of the source's own run: its directory, its start, its allowed changes."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": None, "allow_change": []}),
            "checkpoint": config.checkpoint.model_copy(update={"resume": "auto", "init_from": None, "init_ema": None}),
        }
    )


def renamed(config: Config, ending: str) -> Config:
    """The config of the new model as a separate run."""
    return config.model_copy(update={"run": config.run.model_copy(update={"name": f"{config.run.name}-{ending}"})})
