"""Model weights of megatron-core: read from distributed checkpoints (torch_dist) and from files of tensor and pipeline ranks, written as
the latter. Weights only: neither optimizer state nor the run's arguments, so the model comes from a config.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale.checkpoint.streaming import Target
from megascale.config.schema import Model
from megascale.errors import UsageError
from megascale.formats.appear import appearing
from megascale.formats.hf import Foreign
from megascale.formats.links import Link, Rearranged, Sizes, compare_names, extents, steps_to_ours, steps_to_theirs
from megascale.formats.megatron_names import Cut, check_model, rank_links, rank_name, stacked
from megascale.formats.pickles import read_pickle, read_torch, read_torch_bytes
from megascale.formats.sources import Checkpoint

LATEST = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?")
SHARD = re.compile(r"__\d+_\d+\.distcp")
ELEMENTS = 1 << 24  # compared at once


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
        return _stamp(self.folder / rank / FILE for rank in self.ranks)

    def read(self, name: str, offset: Sizes, shape: Sizes) -> Tensor:
        rank, _, inner = name.partition("/")
        return self._model(rank)[inner][tuple(slice(o, o + n) for o, n in zip(offset, shape))]

    def _model(self, rank: str) -> dict[str, Tensor]:
        path = self.folder / rank / FILE
        held = read_torch(path)
        model = held.get("model") if isinstance(held, Mapping) else None
        if not isinstance(model, Mapping):
            more = " (model0, model1: several stages a rank)" if isinstance(held, Mapping) and "model0" in held else ""
            raise UsageError(f"{path} has no weights under model{more}: save them with one stage a rank")
        return {str(n): t for n, t in model.items() if isinstance(t, Tensor) and not str(n).endswith("_extra_state")}


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor in a .distcp file, as torch.save wrote it."""

    offset: Sizes
    size: Sizes
    file: str
    begin: int
    length: int


@dataclass(frozen=True)
class Distributed:
    """The tensors of a torch_dist checkpoint. A chunk is read whole, the last few are kept: memory is theirs."""

    folder: Path
    chunks: Mapping[str, tuple[Chunk, ...]]
    dtypes: Mapping[str, torch.dtype]

    @cached_property
    def tensors(self) -> dict[str, Target]:
        return {
            name: Target(name, self.dtypes[name], tuple(max(c.offset[d] + c.size[d] for c in parts) for d in range(len(parts[0].size))))
            for name, parts in self.chunks.items()
        }

    @property
    def stamp(self) -> str:
        return _stamp(self.folder / name for name in sorted({c.file for parts in self.chunks.values() for c in parts}))

    def read(self, name: str, offset: Sizes, shape: Sizes) -> Tensor:
        out, filled = torch.empty(shape, dtype=self.dtypes[name]), 0
        for c in self.chunks[name]:
            low = tuple(map(max, offset, c.offset))
            high = tuple(min(o + n, p + m) for o, n, p, m in zip(offset, shape, c.offset, c.size))
            if any(a >= b for a, b in zip(low, high)):
                continue
            whole = _chunk(self.folder / c.file, c.begin, c.length)
            if tuple(whole.shape) != c.size or whole.dtype != out.dtype:
                raise UsageError(
                    f"{self.folder / c.file} holds {whole.dtype} {list(whole.shape)} and .metadata says {out.dtype} {list(c.size)}: {name} "
                    "is damaged"
                )
            part = whole[tuple(slice(a - p, b - p) for a, b, p in zip(low, high, c.offset))]
            out[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset))] = part
            filled += part.numel()
        if filled != out.numel():
            raise UsageError(
                f"{self.folder} stores {filled} of {out.numel()} elements of {name} at {list(offset)}: the checkpoint is not whole"
            )
        return out


@lru_cache(maxsize=4)
def _chunk(path: Path, begin: int, length: int) -> Tensor:
    try:
        with path.open("rb") as file:
            file.seek(begin)
            data = file.read(length)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}): the checkpoint is not whole") from None
    found = read_torch_bytes(data, f"{path} at {begin}")
    if not isinstance(found, Tensor):
        raise UsageError(f"{path} at {begin} holds no tensor: the checkpoint is damaged")
    return found


def _stamp(paths: Any) -> str:
    return hashlib.blake2b(
        json.dumps([[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]).encode(), digest_size=16
    ).hexdigest()


def find_iteration(folder: Path) -> Path:
    """A checkpoint folder of Megatron, or the iteration in it that was saved last. Raises UsageError."""
    if (folder / LATEST).is_file():
        text = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        named = folder / ("release" if text == "release" else f"iter_{int(text):07d}" if text.isdigit() else "")
        if named == folder or not named.is_dir():
            raise UsageError(f"{folder / LATEST} says {text[:40]!r}, and there is no such iteration in {folder}: name the folder iter_…")
        return named
    if (folder / "metadata.json").is_file() or any(RANK.fullmatch(p.name) for p in folder.glob("mp_rank_*")):
        return folder
    raise UsageError(f"{folder} holds neither mp_rank_… folders nor a metadata.json: name a checkpoint of Megatron, or its folder iter_…")


def read_megatron(folder: str | Path, model: Model, seq_len: int, dtype: torch.dtype | None = None) -> Foreign:
    """The weights of `model` in a checkpoint of Megatron. Raises UsageError where they are not those of such a model, or not whole."""
    where = find_iteration(Path(folder))
    if (where / "metadata.json").is_file():
        source, cut = _open_distributed(where)
        layered = not any(re.match(r"decoder\.layers\.\d+\.", n) for n in source.tensors)
        check_model(model, cut)
        links = [stacked(link, layered) for link in rank_links(model, seq_len, cut)[0]]
        return _foreign(model, seq_len, links, [], source, str(where), dtype)
    files, cut = _open_ranks(where)
    check_model(model, cut)
    links, copies = rank_links(model, seq_len, cut)
    return _foreign(model, seq_len, links, copies, files, str(where), dtype)


def _foreign(
    model: Model, seq_len: int, links: list[Link], copies: list[Link], source: Any, where: str, dtype: torch.dtype | None
) -> Foreign:
    held = source.tensors
    assert model.vocab_size is not None
    padded = frozenset(n for n in held if n.endswith(("word_embeddings.weight", "output_layer.weight")))
    compare_names(extents(steps_to_theirs([*links, *copies])), held, where, padded)
    steps = steps_to_ours(links)
    for copy in copies:
        _same(copy, links, source)
    dtypes = {name: dtype or held[parts[0].source].dtype for name, parts in steps.items()}
    targets = [Target(name, dtypes[name], shape) for name, shape in extents(steps).items()]
    short = next((t for t in targets if t.name.endswith(("embedding.weight", "head.weight")) and t.shape[0] != model.vocab_size), None)
    if short is not None:
        raise UsageError(f"{where} has {short.shape[0]} rows for {short.name}, and model.vocab_size is {model.vocab_size}: lower it")
    return Foreign(model, seq_len, targets, Rearranged(source, steps, dtypes), {}, source.stamp)


def _same(copy: Link, links: list[Link], source: Any) -> None:
    """Raises UsageError where a rank's copy of a tensor is not that of the rank it was read from."""
    first = next(k for k in links if k.ours == copy.ours and k.at == copy.at)
    rows = max(1, ELEMENTS // max(1, math.prod(copy.size[1:])))
    for start in range(0, copy.size[0], rows):
        size = (min(rows, copy.size[0] - start), *copy.size[1:])
        a, b = (source.read(k.theirs, (k.to[0] + start, *k.to[1:]), size) for k in (first, copy))
        if not torch.equal(a, b):
            raise UsageError(f"{copy.theirs} differs from {first.theirs}, of which it is a copy: the ranks are not of one checkpoint")


def _open_ranks(folder: Path) -> tuple[RankFiles, Cut]:
    found = {p.name: RANK.fullmatch(p.name) for p in sorted(folder.glob("mp_rank_*"))}
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
    if table is None:
        raise UsageError(f"{folder / first / FILE} has no embedding.word_embeddings.weight: it is no GPT model of megatron-core")
    spec = "te" if any(n.endswith("linear_qkv.layer_norm_weight") for n in names) else "local"
    return source, Cut(tp, pp, spec, table.shape[0] * tp)


def _open_distributed(folder: Path) -> tuple[Distributed, Cut]:
    try:
        said = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / 'metadata.json'} cannot be read ({error}): the checkpoint is not whole") from None
    backend = said.get("sharded_backend") if isinstance(said, dict) else None
    if backend != "torch_dist":
        raise UsageError(
            f"{folder / 'metadata.json'} says sharded_backend {backend!r}, and torch_dist can be read: save with --ckpt-format torch_dist"
        )
    try:
        source = _read_metadata(folder)
    except (KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise UsageError(
            f"{folder / '.metadata'} is not what torch writes ({type(error).__name__}: {error}): the checkpoint is damaged"
        ) from None
    table = source.tensors.get("embedding.word_embeddings.weight")
    if table is None:
        raise UsageError(f"{folder} has no embedding.word_embeddings.weight: it is no GPT model of megatron-core")
    return source, Cut(1, 1, "te", table.shape[0])


def _read_metadata(folder: Path) -> Distributed:
    """The chunks of every model tensor. Optimizer state and objects are left where they are."""
    state = read_pickle(folder / ".metadata").state
    chunks: dict[str, list[Chunk]] = {}
    dtypes: dict[str, torch.dtype] = {}
    places = {}
    for index, info in state["storage_data"].items():
        places[index.state["fqn"], tuple(index.state.get("offset") or ())] = info.state
    for name, meta in state["state_dict_metadata"].items():
        if "chunks" not in meta.state or name.startswith(("optimizer.", "chained_")) or name.endswith("_extra_state"):
            continue
        dtype = meta.state["properties"].state
        dtypes[name] = dtype[0] if isinstance(dtype, tuple) else dtype["dtype"]
        for c in meta.state["chunks"]:
            offset, size = tuple(c.state["offsets"]), tuple(c.state["sizes"])
            place = places[name, offset]
            if not SHARD.fullmatch(place["relative_path"]):
                raise UsageError(
                    f"{folder / '.metadata'} puts {name} into {place['relative_path']!r}, which is no file of a checkpoint: do not trust it"
                )
            chunks.setdefault(name, []).append(Chunk(offset, size, place["relative_path"], int(place["offset"]), int(place["length"])))
    return Distributed(folder, {n: tuple(parts) for n, parts in chunks.items()}, dtypes)


def write_megatron(checkpoint: Checkpoint, folder: Path, tp: int, pp: int, spec: str, divisible: int, dtype: torch.dtype | None) -> Foreign:
    """Writes `folder`/iter_…/mp_rank_…/model_optim_rng.pt, one rank after the other: memory is that of one rank.

    spec       where norms stand: te (fused, Megatron's default) or local
    divisible  rows of the vocabulary are padded with zeros to a multiple of this times tp

    Raises UsageError; then nothing is left.
    """
    model, held = checkpoint.model, checkpoint.source.tensors
    assert model.vocab_size is not None
    unit = divisible * tp
    cut = Cut(tp, pp, spec, -(-model.vocab_size // unit) * unit)
    check_model(model, cut)
    links, copies = rank_links(model, checkpoint.seq_len, cut)
    steps = steps_to_theirs([*links, *copies])
    shapes = extents(steps)
    tables = {n for n in shapes if n.endswith(("word_embeddings.weight", "output_layer.weight"))}
    shapes |= {n: (cut.rows // tp, shapes[n][1]) for n in tables}
    dtypes = {name: dtype or held[parts[0].source].dtype for name, parts in steps.items()}
    produce = Rearranged(checkpoint.source, steps, dtypes)
    iteration = int(checkpoint.trainer.get("step", 0))
    with appearing(folder) as temporary:
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
