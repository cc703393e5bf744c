"""Fields on a grid from memory-mapped arrays: samples for the spacetime family; each depends only on (seed, number).

A source is PREFIX.npy, [frames, s₂ … s_K, channels] of any float type, and PREFIX.json with facts about it: `mean` and `std` per channel,
which normalize the values, and `run_length`, the frames after which another, unrelated run begins. If each run has a text, PREFIX.text
are token files with one document per run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megascale.config.schema import Spacetime
from megascale.data.dataset import Corpus, check_tokens
from megascale.data.facts import is_file, source_facts
from megascale.data.history import Segment, continue_plan
from megascale.data.indexed import TokenFile
from megascale.data.loader import NOT_COUNTED, Batch, to_device
from megascale.data.order import MixPlan, permute, permute_many, plan_mixture, split_documents
from megascale.errors import UsageError


class FieldFile:
    """One array and the runs of it to use: `part` "train" or "valid" of a split by whole runs, or "all"."""

    def __init__(self, source: Corpus, fields: Spacetime, part: str, valid_fraction: float) -> None:
        path = Path(source.path + ".npy")
        if not is_file(path):
            raise UsageError(f"data: there is no {str(path)[:300]}: name a prefix of .npy and .json files")
        try:
            self.array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, OverflowError) as error:
            raise UsageError(f"{path} cannot be read as an array ({error}): make it again") from None
        if not isinstance(self.array, np.ndarray):
            raise UsageError(f"{path} is an archive of arrays, but one array is needed: save it with numpy.save")
        expected = (*fields.shape[1:], fields.channels)
        if self.array.shape[1:] != expected or self.array.dtype.kind != "f":
            raise UsageError(
                f"{path} holds {self.array.dtype} of shape {list(self.array.shape)}, but model.spacetime has shape {list(fields.shape)} "
                f"and {fields.channels} channels: [frames, {', '.join(map(str, expected))}] of floats is needed"
            )
        facts = source_facts(source.path)
        self.mean, self.std = (self._channels(facts, name, default, fields.channels) for name, default in (("mean", 0.0), ("std", 1.0)))
        self.run_length = int(facts.get("run_length", len(self.array)))
        count = len(self.array) // max(1, self.run_length)
        train, valid = split_documents(count, valid_fraction)
        self.runs: NDArray[np.int64] = {"train": train, "valid": valid, "all": np.arange(count)}[part]
        self.text: TokenFile | None = None
        if fields.text_len:
            self.text = TokenFile(source.path + ".text")
            if len(self.text) != count:
                raise UsageError(
                    f"{path} holds {count} runs but {source.path}.text has {len(self.text)} documents: one text per run is needed; prepare "
                    f"JSONL with a line for each run with megascale prepare --out {source.path}.text"
                )
        self.starts = self.run_length - fields.frames + 1  # number of windows in a run
        if len(self.runs) == 0 or self.starts < 1:
            raise UsageError(
                f"{path} has {len(self.runs)} runs of {self.run_length} frames in its {part} part, and one sample needs {fields.frames}: "
                "simulate longer or more, or shorten the first of model.spacetime.shape"
            )

    def __len__(self) -> int:
        return len(self.runs) * self.starts

    def read(self, window: int, frames: int) -> NDArray[np.float32]:
        run, start = divmod(window, self.starts)
        begin = int(self.runs[run]) * self.run_length + start
        return ((self.array[begin : begin + frames] - self.mean) / self.std).astype(np.float32)

    def read_text(self, window: int, vocab_size: int) -> NDArray[np.int64]:
        """The text of the window's run."""
        assert self.text is not None
        tokens = self.text.read(int(self.runs[window // self.starts])).astype(np.int64)
        check_tokens(tokens, Corpus(self.text.prefix, 1.0, ""), vocab_size, "model.spacetime.text_vocab_size")
        return tokens

    def _channels(self, facts: dict[str, Any], name: str, default: float, channels: int) -> NDArray[np.float64]:
        values = np.array(facts.get(name, [default] * channels), np.float64)
        if values.shape != (channels,) or not np.isfinite(values).all() or (name == "std" and (values <= 0).any()):
            raise UsageError(f"the {name} of {self.array.filename} is {values.tolist()}: give one number per channel")  # type: ignore[attr-defined]
        return values


class FieldMixture:
    """Windows of `fields.frames` frames for sample numbers n ≥ 0, from one or several arrays, reshuffled every epoch."""

    def __init__(self, sources: list[Corpus], fields: Spacetime, seed: int, part: str, valid_fraction: float, shuffled: bool) -> None:
        self.fields, self.seed, self.shuffled, self.sources = fields, seed, shuffled, sources
        self.files = [FieldFile(s, fields, part, valid_fraction) for s in sources]
        self.plan: MixPlan = plan_mixture([s.weight for s in sources], [s.name for s in sources], seed)

    def continued(self, past: Sequence[Segment]) -> None:
        """Continues every source where the segments `past` left it."""
        self.plan = continue_plan(self.plan, [s.name for s in self.sources], past)

    def sample(self, number: int) -> NDArray[np.float32]:
        """[frames, s₂ … s_K, channels], normalized."""
        file, window = self._window(number)
        return file.read(window, self.fields.frames)

    def text(self, number: int) -> NDArray[np.int64]:
        """The sample's text, truncated to the available positions."""
        file, window = self._window(number)
        assert self.fields.text_vocab_size is not None
        return file.read_text(window, self.fields.text_vocab_size)[: self.fields.text_len]

    def _window(self, number: int) -> tuple[FieldFile, int]:
        which, index = self.plan.locate(number)
        file = self.files[which]
        epoch, window = divmod(index, len(file))
        if self.shuffled:
            window = permute(window, len(file), self.seed, self.sources[which].name, epoch)
        return file, window

    def batch(self, numbers: list[int], device: torch.device) -> Batch:
        """`tokens` [b, frames, s₂ … s_K, channels] are the fields; `targets` [b, tokens] are 0 for patches that count. The masked objective
        counts a fixed share of the patches, chosen by (seed, number). NOT_COUNTED as a sample number leaves a row empty.
        """
        f = self.fields
        fields = np.zeros((len(numbers), f.frames, *f.shape[1:], f.channels), np.float32)
        targets = np.full((len(numbers), f.tokens), NOT_COUNTED, np.int64)
        for row, number in enumerate(numbers):
            if number != NOT_COUNTED:
                fields[row], targets[row] = self.sample(number), self._targets(number)
        samples = to_device(np.array(numbers, np.int64), device)
        source = None
        if f.text_len:
            texts = np.full((len(numbers), f.text_len), NOT_COUNTED, np.int64)
            for row, number in enumerate(numbers):
                if number != NOT_COUNTED:
                    text = self.text(number)
                    texts[row, : len(text)] = text
            source = to_device(texts, device)
        return Batch(to_device(fields, device), to_device(targets, device), None, None, samples, int((targets >= 0).sum()), source)

    def _targets(self, number: int) -> NDArray[np.int64]:
        if self.fields.objective == "next_step":
            return np.zeros(self.fields.tokens, np.int64)
        hidden = max(1, round(self.fields.mask_ratio * self.fields.tokens))
        place = permute_many(np.arange(self.fields.tokens), self.fields.tokens, self.seed, "mask", number)
        return np.where(place < hidden, 0, NOT_COUNTED)
