"""Distributed checkpoints of megatron-core (torch_dist): read, and written rectangle by rectangle.

A folder has `.metadata`, a pickle with the location of every rectangle of every tensor; `.distcp` files, each a sequence of torch.save
outputs; `common.pt` for everything but tensors; and metadata.json with the format's name. All layers of a kind form one tensor, layers
first.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megascale.checkpoint.streaming import ReadSlice, Target, slabs
from megascale.errors import UsageError
from megascale.files import write_durably
from megascale.formats.json_file import read_object
from megascale.formats.megatron.pickles import DAMAGED, read_pickle, read_torch_bytes
from megascale.formats.megatron.tensor_names import Cut
from megascale.formats.tensor_maps import Sizes

SHARD = re.compile(r"__\d+_\d+\.distcp")
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
STACKED = re.compile(r"decoder\.layers\.[^0-9]")
CHUNK = 1 << 24  # elements of a rectangle per write
LARGEST = 1 << 48  # of a dimension's length
FILE_BYTES = 4 * 10**9  # after which a new file begins


@dataclass(frozen=True)
class StoredChunk:
    """A rectangle of a tensor in a .distcp file, as torch.save wrote it."""

    offset: Sizes
    size: Sizes
    file: str
    begin: int
    length: int


@dataclass(frozen=True)
class Distributed:
    """The tensors of a torch_dist checkpoint. Chunks are read whole, and the last few are cached."""

    folder: Path
    chunks: Mapping[str, tuple[StoredChunk, ...]]
    dtypes: Mapping[str, torch.dtype]

    @cached_property
    def tensors(self) -> dict[str, Target]:
        return {
            name: Target(name, self.dtypes[name], tuple(max(c.offset[d] + c.size[d] for c in parts) for d in range(len(parts[0].size))))
            for name, parts in self.chunks.items()
        }

    @property
    def stamp(self) -> str:
        return stamp_of(self.folder / name for name in sorted({c.file for parts in self.chunks.values() for c in parts}))

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
                    f"{self.folder / c.file} holds {whole.dtype} {list(whole.shape)} but .metadata says {out.dtype} {list(c.size)}: {name} "
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
            if begin + length > os.fstat(file.fileno()).st_size:
                raise UsageError(f"{path} ends before byte {begin + length}: the checkpoint is not whole")
            file.seek(begin)
            data = file.read(length)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}): the checkpoint is not whole") from None
    found = read_torch_bytes(data, f"{path} at {begin}")
    if not isinstance(found, Tensor):
        raise UsageError(f"{path} at {begin} does not hold a tensor: the checkpoint is damaged")
    return found


def stamp_of(paths: Any) -> str:
    return hashlib.blake2b(
        json.dumps([[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]).encode(), digest_size=16
    ).hexdigest()


def open_distributed(folder: Path) -> tuple[Distributed, Cut]:
    backend = read_object(folder / "metadata.json", "the checkpoint is not whole", DAMAGED).get("sharded_backend")
    if backend != "torch_dist":
        raise UsageError(
            f"{folder / 'metadata.json'} says sharded_backend {backend!r}, but only torch_dist is read: save with --ckpt-format torch_dist"
        )
    try:
        source = _read_metadata(folder)
    except (KeyError, AttributeError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise UsageError(
            f"{folder / '.metadata'} is not in torch's format ({type(error).__name__}: {str(error)[:200]}): {DAMAGED}"
        ) from None
    table = source.tensors.get("embedding.word_embeddings.weight")
    if table is None or len(table.shape) != 2:
        raise UsageError(f"{folder} has no embedding.word_embeddings.weight: it is not a GPT model of megatron-core")
    spec = "te" if any(".pre_mlp_layernorm." in n for n in source.tensors) else "dist_local"
    return source, Cut(1, 1, spec, table.shape[0])


def _read_metadata(folder: Path) -> Distributed:
    """The chunks of every model tensor. Optimizer state and objects are ignored."""
    state = read_pickle(folder / ".metadata").state
    chunks: dict[str, list[StoredChunk]] = {}
    dtypes: dict[str, torch.dtype] = {}
    places = {}
    for index, info in state["storage_data"].items():
        places[index.state["fqn"], tuple(index.state.get("offset") or ())] = info.state
    for name, meta in state["state_dict_metadata"].items():
        if "chunks" not in meta.state or name.startswith(("optimizer.", "chained_")) or name.endswith("_extra_state"):
            continue
        dtype = meta.state["properties"].state
        dtypes[name] = dtype[0] if isinstance(dtype, tuple) else dtype["dtype"]
        if not isinstance(dtypes[name], torch.dtype):
            raise TypeError(f"{name} has an unsupported dtype")
        for c in meta.state["chunks"]:
            offset, size = tuple(c.state["offsets"]), tuple(c.state["sizes"])
            place = places[name, offset]
            if not SHARD.fullmatch(place["relative_path"]):
                raise UsageError(
                    f"{folder / '.metadata'} puts {name} into {place['relative_path']!r}, which is no file of a checkpoint: do not trust it"
                )
            begin, length = place["offset"], place["length"]
            dims = len(chunks[name][0].size) if name in chunks else len(size)
            if len(offset) != dims or len(size) != dims or any(type(n) is not int or not 0 <= n < LARGEST for n in (*offset, *size)):
                raise ValueError(f"a rectangle of {name} has size {size} at {offset}")
            if any(type(n) is not int or n < 0 for n in (begin, length)):
                raise ValueError(f"{name} lies at {begin}, {length} bytes long")
            chunks.setdefault(name, []).append(StoredChunk(offset, size, place["relative_path"], begin, length))
    return Distributed(folder, {n: tuple(parts) for n, parts in chunks.items()}, dtypes)


def write_distributed(folder: Path, targets: list[Target], produce: ReadSlice, states: list[str], iteration: int) -> None:
    """Writes an iteration's folder: `targets`, and for `states` the empty objects that modules require besides their weights.

    Needs memory for a rectangle of CHUNK elements. A rectangle never spans two layers.
    """
    folder.mkdir(parents=True)
    found: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    empty = io.BytesIO()
    torch.save([None], empty)
    with Files(folder) as files:
        for name in states:
            found[name] = BytesStorageMetadata()
            storage[MetadataIndex(name)] = files.add(empty.getvalue())
        for target in targets:
            chunks = []
            for offset, size in rectangles(target):
                data = io.BytesIO()
                part = produce(target.name, offset, size)
                # A view would be written with its whole storage.
                torch.save(part if part.untyped_storage().nbytes() == part.nbytes else part.clone(), data)
                chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
                storage[MetadataIndex(target.name, torch.Size(offset))] = files.add(data.getbuffer())
            found[target.name] = TensorStorageMetadata(TensorProperties(dtype=target.dtype), torch.Size(target.shape), chunks)
    common = io.BytesIO()
    torch.save({"checkpoint_version": 3.0, "iteration": iteration}, common)
    write_durably(folder / "common.pt", common.getvalue())
    write_durably(folder / ".metadata", pickle.dumps(Metadata(found, None, storage)))
    write_durably(folder / "metadata.json", json.dumps(FORMAT).encode())


def rectangles(target: Target) -> Iterator[tuple[Sizes, Sizes]]:
    """Rectangles of a tensor, layer by layer if it is [layers, …], of at most CHUNK elements if rows allow it."""
    if not STACKED.match(target.name):
        yield from slabs((0,) * len(target.shape), target.shape, CHUNK)
        return
    inner = target.shape[1:]
    for layer, (offset, size) in itertools.product(range(target.shape[0]), list(slabs((0,) * len(inner), inner, CHUNK))):
        yield (layer, *offset), (1, *size)


class Files:
    """`.distcp` files; starts a new one when the last is full."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, -1
        self.file: BinaryIO | None = None

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()

    def add(self, data: bytes | memoryview) -> _StorageInfo:
        """Appends a torch.save output and returns its location."""
        if self.file is None or self.file.tell() >= FILE_BYTES:
            self.__exit__()
            self.number += 1
            self.file = (self.folder / f"__0_{self.number}.distcp").open("wb")
        offset = self.file.tell()
        self.file.write(data)
        return _StorageInfo(f"__0_{self.number}.distcp", offset, len(data))
