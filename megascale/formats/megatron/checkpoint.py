"""Model weights of megatron-core: reads distributed checkpoints (torch_dist) and files per tensor and pipeline rank, and writes either.
Weights only, without optimizer state or the run's arguments, so the model comes from a config.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale.checkpoint.streaming import Target
from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.files import atomic_folder
from megascale.formats.megatron.distributed import open_distributed, stamp_of, write_distributed
from megascale.formats.megatron.pickles import read_torch
from megascale.formats.megatron.tensor_names import Cut, check_model, empty_states, homogeneous, rank_links, rank_name, stacked
from megascale.formats.shapes import check_depth, check_floating
from megascale.formats.sources import Foreign, OpenCheckpoint
from megascale.formats.tensor_maps import Rearranged, Sizes, TensorMap, compare_names, copies_to_ours, copies_to_theirs, extents

LATEST = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
ITERATION = re.compile(r"[0-9]{1,18}")
RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?")
ELEMENTS = 1 << 24  # elements compared at once


@dataclass(frozen=True)
class RankFiles:
    """The tensors of mp_rank_… folders, named `mp_rank_…/name`. Files are mapped, not read."""

    folder: Path
    ranks: tuple[str, ...]

    @cached_property
    def tensors(self) -> dict[str, Target]:
        return {f"{rank}/{n}": Target(n, t.dtype, tuple(t.shape)) for rank in self.ranks for n, t in self._model(rank).items()}

    @property
    def stamp(self) -> str:
        return stamp_of(self.folder / rank / FILE for rank in self.ranks)

    def read(self, name: str, offset: Sizes, shape: Sizes) -> Tensor:
        rank, _, inner = name.partition("/")
        return self._model(rank)[inner][tuple(slice(o, o + n) for o, n in zip(offset, shape))]

    def _model(self, rank: str) -> dict[str, Tensor]:
        path = self.folder / rank / FILE
        held = read_torch(path)
        model = held.get("model") if isinstance(held, Mapping) else None
        if not isinstance(model, Mapping):
            more = " (model0, model1: several stages per rank)" if isinstance(held, Mapping) and "model0" in held else ""
            raise UsageError(f"{path} has no weights under model{more}: save them with one stage per rank")
        return {str(n): t for n, t in model.items() if isinstance(t, Tensor) and not str(n).endswith("_extra_state")}


def find_iteration(folder: Path) -> Path:
    """A checkpoint folder of Megatron, or its last iteration. Raises UsageError."""
    if (folder / LATEST).is_file():
        with (folder / LATEST).open(encoding="utf-8", errors="replace") as file:
            text = file.read(100).strip()
        named = folder / ("release" if text == "release" else f"iter_{int(text):07d}" if ITERATION.fullmatch(text) else "")
        if named == folder or not named.is_dir():
            raise UsageError(f"{folder / LATEST} says {text[:40]!r}, but there is no such iteration in {folder}: name the folder iter_…")
        return named
    if (folder / "metadata.json").is_file() or any(RANK.fullmatch(p.name) for p in folder.glob("mp_rank_*")):
        return folder
    raise UsageError(f"{folder} holds neither mp_rank_… folders nor a metadata.json: name a checkpoint of Megatron, or its folder iter_…")


def read_megatron(folder: str | Path, model: Model, seq_len: int, dtype: torch.dtype | None = None) -> Foreign:
    """The weights of `model` in a checkpoint of Megatron. Raises UsageError if they belong to another model or are incomplete."""
    where = find_iteration(Path(folder))
    said = f"the config given for {where}"
    if (where / "metadata.json").is_file():
        source, cut = open_distributed(where)
        layered = not any(re.match(r"decoder\.layers\.\d+\.", n) for n in source.tensors)
        check_model(model, cut)
        check_depth(model, sum(t.shape[0] if t.shape else 0 for t in source.tensors.values()), said)
        links = [stacked(link, layered) for link in rank_links(model, seq_len, cut)[0]]
        return _foreign(model, seq_len, links, [], source, str(where), dtype)
    files, cut = _open_ranks(where)
    check_model(model, cut)
    check_depth(model, len(files.tensors), said)
    links, copies = rank_links(model, seq_len, cut)
    return _foreign(model, seq_len, links, copies, files, str(where), dtype)


def _foreign(
    model: Model, seq_len: int, links: list[TensorMap], copies: list[TensorMap], source: Any, where: str, dtype: torch.dtype | None
) -> Foreign:
    held = source.tensors
    assert model.vocab_size is not None
    check_floating(held, where)
    padded = frozenset(n for n in held if n.endswith(("word_embeddings.weight", "output_layer.weight")))
    compare_names(extents(copies_to_theirs([*links, *copies])), held, where, padded)
    steps = copies_to_ours(links)
    for copy in copies:
        _same(copy, links, source)
    dtypes = {name: dtype or held[parts[0].source].dtype for name, parts in steps.items()}
    targets = [Target(name, dtypes[name], shape) for name, shape in extents(steps).items()]
    short = next((t for t in targets if t.name.endswith(("embedding.weight", "head.weight")) and t.shape[0] != model.vocab_size), None)
    if short is not None:
        raise UsageError(f"{where} has {short.shape[0]} rows for {short.name}, but model.vocab_size is {model.vocab_size}: lower it")
    return Foreign(model, seq_len, targets, Rearranged(source, steps, dtypes), {}, source.stamp)


def _same(copy: TensorMap, links: list[TensorMap], source: Any) -> None:
    """Raises UsageError if a rank's copy of a tensor differs from the one that was read."""
    first = next(k for k in links if k.ours == copy.ours and k.at == copy.at)
    rows = max(1, ELEMENTS // max(1, math.prod(copy.size[1:])))
    for start in range(0, copy.size[0], rows):
        size = (min(rows, copy.size[0] - start), *copy.size[1:])
        a, b = (source.read(k.theirs, (k.to[0] + start, *k.to[1:]), size) for k in (first, copy))
        if not torch.equal(a, b):
            raise UsageError(f"{copy.theirs} differs from {first.theirs}, of which it is a copy: the ranks do not belong to one checkpoint")


def _open_ranks(folder: Path) -> tuple[RankFiles, Cut]:
    found = {p.name: RANK.fullmatch(p.name) for p in sorted(folder.glob("mp_rank_*"))}
    if not found:
        raise UsageError(f"{folder} holds neither mp_rank_… folders nor a metadata.json: the checkpoint is not whole")
    odd = next((name for name, match in found.items() if match is None), None)
    if odd is not None:
        raise UsageError(f"{folder / odd} is a rank of experts or of another layout: only tensor and pipeline ranks can be read")
    places = [(int(m[1]), int(m[2] or 0)) for m in found.values() if m is not None]
    tp, pp = max(p[0] for p in places) + 1, max(p[1] for p in places) + 1
    missing = {(t, p) for t in range(tp) for p in range(pp)} - set(places)
    source = RankFiles(folder, tuple(found))
    cut = Cut(tp, pp, "te", 0)
    if missing:
        raise UsageError(f"{folder / rank_name(*min(missing), cut)} is missing: {len(found)} of {tp * pp} ranks are here; get the others")
    first = rank_name(0, 0, cut)
    names = source.tensors
    table = names.get(f"{first}/embedding.word_embeddings.weight")
    if table is None or len(table.shape) != 2:
        raise UsageError(f"{folder / first / FILE} has no embedding.word_embeddings.weight: it is not a GPT model of megatron-core")
    spec = "te" if any(n.endswith("linear_qkv.layer_norm_weight") for n in names) else "local"
    experts = "grouped" if any(".mlp.experts.linear_fc1.weight" in n for n in names) else "sequential"
    return source, Cut(tp, pp, spec, table.shape[0] * tp, experts)


def write_megatron(
    checkpoint: OpenCheckpoint,
    folder: Path,
    tp: int,
    pp: int,
    spec: str,
    divisible: int,
    dtype: torch.dtype | None,
    experts: str = "sequential",
) -> Foreign:
    """Writes `folder`/iter_…/mp_rank_…/model_optim_rng.pt, one rank after the other: memory is that of one rank.

    spec       kind of norm modules: te (fused, Megatron's default) or local
    divisible  rows of the vocabulary are padded with zeros to a multiple of this times tp
    experts    grouped (one module with a weight per expert, as under --moe-grouped-gemm) or sequential

    Raises UsageError; then nothing is left.
    """
    model, held = checkpoint.model, checkpoint.source.tensors
    assert model.vocab_size is not None
    unit = divisible * tp
    cut = Cut(tp, pp, spec, -(-model.vocab_size // unit) * unit, experts)
    check_model(model, cut)
    links, copies = rank_links(model, checkpoint.seq_len, cut)
    steps = copies_to_theirs([*links, *copies])
    shapes = extents(steps)
    tables = {n for n in shapes if n.endswith(("word_embeddings.weight", "output_layer.weight"))}
    shapes |= {n: (cut.rows // tp, shapes[n][1]) for n in tables}
    dtypes = {name: dtype or held[parts[0].source].dtype for name, parts in steps.items()}
    produce = Rearranged(checkpoint.source, steps, dtypes)
    iteration = checkpoint.step
    with atomic_folder(folder) as temporary:
        for t in range(tp):
            for p in range(pp):
                rank = rank_name(t, p, cut)
                mine = {n: s for n, s in shapes.items() if n.startswith(f"{rank}/")}
                state = {n.partition("/")[2]: produce(n, (0,) * len(s), s) for n, s in mine.items()}
                path = temporary / f"iter_{iteration:07d}" / rank / FILE
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    torch.save({"model": state, "checkpoint_version": 3.0, "iteration": iteration}, file)
                    file.flush()
                    os.fsync(file.fileno())
        (temporary / LATEST).write_text(str(iteration))
    targets = [Target(n, dtypes[n], s) for n, s in shapes.items()]
    return Foreign(model, checkpoint.seq_len, targets, produce, {}, checkpoint.source.stamp)


def write_torch_dist(checkpoint: OpenCheckpoint, folder: Path, spec: str, divisible: int, dtype: torch.dtype | None) -> Foreign:
    """Writes `folder`/iter_…, a distributed checkpoint that loads on any layout; needs memory for a few rectangles, for any model.

    spec       te or local, which differ only with experts
    divisible  rows of the vocabulary are padded with zeros to a multiple of this

    Raises UsageError; then nothing is left.
    """
    model, held = checkpoint.model, checkpoint.source.tensors
    assert model.vocab_size is not None
    cut = Cut(1, 1, "te" if spec == "te" else "dist_local", -(-model.vocab_size // divisible) * divisible)
    check_model(model, cut)
    steps = copies_to_theirs([stacked(link, homogeneous(model)) for link in rank_links(model, checkpoint.seq_len, cut)[0]])
    shapes = extents(steps)
    shapes |= {n: (cut.rows, *s[1:]) for n, s in shapes.items() if n.endswith(("word_embeddings.weight", "output_layer.weight"))}
    dtypes = {name: dtype or held[parts[0].source].dtype for name, parts in steps.items()}
    produce = Rearranged(checkpoint.source, steps, dtypes)
    targets = [Target(n, dtypes[n], s) for n, s in shapes.items()]
    iteration = checkpoint.step
    with atomic_folder(folder) as temporary:
        into = temporary / f"iter_{iteration:07d}"
        shutil.rmtree(into, ignore_errors=True)  # of a killed run: its files have no marks to continue from
        write_distributed(into, targets, produce, empty_states(model), iteration)
        (temporary / LATEST).write_text(str(iteration))
    return Foreign(model, checkpoint.seq_len, targets, produce, {}, checkpoint.source.stamp)
