"""Sources of tensors: anything with an index of chunks in safetensors files, including our own checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from megascale.checkpoint.index import DTYPES, INDEX, TRAINER, Index, read_index
from megascale.checkpoint.loader import find
from megascale.checkpoint.shards import read_slice
from megascale.checkpoint.streaming import ReadSlice, Target
from megascale.checkpoint.trainer import read_trainer
from megascale.config.schema import Model, Optim
from megascale.errors import UsageError
from megascale.formats.shapes import MODEL, check_depth, our_shapes
from megascale.formats.tensor_maps import Sizes, compare_names
from megascale.optim.averages import Average, averages_of, own_average
from megascale.plugins import gone

LAST_STEP = 10**15


@dataclass(frozen=True)
class StoredTensors:
    """Tensors in safetensors files, as a `TensorSource`; `index` says which file holds which part."""

    index: Index
    stamp: str

    @cached_property
    def tensors(self) -> dict[str, Target]:
        return {name: Target(name, DTYPES[t.dtype], t.shape) for name, t in self.index.tensors.items()}

    def read(self, name: str, offset: Sizes, shape: Sizes) -> Tensor:
        return read_slice(self.index, name, offset, shape)


@dataclass(frozen=True)
class AveragedTensors(StoredTensors):
    """The same with an average instead of the weights, in their dtype. What has no average, such as a router's bias, stays as it is."""

    average: Average

    def read(self, name: str, offset: Sizes, shape: Sizes) -> Tensor:
        weight = read_slice(self.index, name, offset, shape)
        stored = [f"optim.{key}.{name.removeprefix(MODEL)}" for key in self.average.keys]
        if not name.startswith(MODEL) or any(n not in self.index.tensors for n in stored):
            return weight
        parts = [read_slice(self.index, n, *((offset, shape) if self.index.tensors[n].shape else ((), ()))) for n in stored]
        return self.average.of(weight, *parts).to(weight.dtype)


@dataclass(frozen=True)
class OpenCheckpoint:
    """One of our checkpoints: the model that its trainer.json describes, and its weights."""

    folder: Path
    model: Model
    seq_len: int
    trainer: dict[str, Any]
    source: StoredTensors

    @property
    def config(self) -> dict[str, Any]:
        """The config of the run, as far as known."""
        return self.trainer["config"]  # type: ignore[no-any-return]

    @property
    def step(self) -> int:
        """The run's training step; 0 if unknown."""
        step = self.trainer.get("step")
        return step if type(step) is int and 0 <= step < LAST_STEP else 0


def open_checkpoint(path: str | Path, average: str | None = None, asked: str = "--ema") -> OpenCheckpoint:
    """A step folder or a run. Raises UsageError if its model is unknown or its weights do not match it.

    average  of `optim.ema`, to have it instead of the weights; `asked`: the option or key that names it. By default an optimizer's own,
             if it has one
    """
    folder = find(path)
    index, trainer = read_index(folder), read_trainer(folder)
    config = trainer.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise UsageError(f"{folder / TRAINER} does not describe the model (no config): it was not written by pretraining or convert.py")
    try:
        model = Model.model_validate(config["model"])
        seq_len = int(config["train"]["seq_len"])
    except ValidationError as error:
        first = error.errors()[0]
        key, value = ".".join(str(part) for part in first["loc"]), repr(first["input"])[:60]
        fix = gone(trainer.get("plugins", {})) if first["type"] == "row_name" else ""
        fix = f"it was {fix}" if fix else "use an older checkpoint"
        raise UsageError(f"{folder / TRAINER} describes an impossible model (model.{key} is {value}: {first['msg']}): {fix}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{folder / TRAINER} does not say train.seq_len ({error}): use an older checkpoint") from None
    source = StoredTensors(index, hashlib.blake2b((folder / INDEX).read_bytes(), digest_size=16).hexdigest())
    held = {name: t for name, t in source.tensors.items() if name.startswith(MODEL)}
    check_depth(model, len(held), str(folder / TRAINER))
    compare_names({MODEL + n: s for n, s in our_shapes(model, seq_len).items()}, held, str(folder))
    chosen = own_of(config) if average is None else choose_average(config, average, asked, folder)
    if chosen is not None:
        source = AveragedTensors(index, f"{source.stamp} {chosen.name}", chosen)
    return OpenCheckpoint(folder, model, seq_len, trainer, source)


def own_of(config: Mapping[str, Any]) -> Average | None:
    """The average of a checkpoint's config that stands for its weights, if there is one."""
    section = config.get("optim")
    try:
        known = {key: section[key] for key in ("name", "betas") if key in section} if isinstance(section, Mapping) else {}
        return own_average(Optim.model_validate(known))
    except ValidationError:  # a plugin's that is not here
        return None


def choose_average(config: Mapping[str, Any], name: str, asked: str, folder: Path) -> Average:
    """The average of a checkpoint's config that is called `name`, or has this number in the list, from 1. Raises UsageError."""
    section = config.get("optim")
    try:
        known = averages_of(Optim.model_validate({"ema": section.get("ema", ()) if isinstance(section, Mapping) else ()}))
    except ValidationError:
        known = []
    for number, average in enumerate(known, 1):
        if name in (average.name, str(number)):
            return average
    there = f"keeps {', '.join(average.name for average in known)}" if known else "keeps no averages (optim.ema)"
    raise UsageError(f"{asked} is {name}, but {folder} {there}: {'give one of these' if known else 'leave it out'}")


@dataclass(frozen=True)
class Foreign:
    """A checked model in another format: our `model`, its longest sequence, how to make our weights, and `notes` for the user."""

    model: Model
    seq_len: int
    targets: list[Target]
    produce: ReadSlice
    config: dict[str, Any]
    stamp: str
    notes: tuple[str, ...] = ()
