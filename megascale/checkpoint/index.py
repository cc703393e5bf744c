"""A checkpoint's table of contents, index.json: what it holds, in which files, and their checksums.

Everything in it is checked before use; nothing is ever unpickled.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import stat
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megascale.checkpoint.grid import Chunk, Grid, grid_of, many, read_grid
from megascale.errors import UsageError

VERSIONS = (1, 2)  # 2 writes the chunks of a tensor as a grid, if they are many
# Readers of older index.json: version → function that converts it to a newer version.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

INDEX = "index.json"
TRAINER = "trainer.json"
# Only plain names inside the folder: no separator, no leading dot, no path that leads elsewhere.
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
LARGEST = 2**63 - 1  # largest size that torch can count
LONGEST = 255  # bytes of a file name on any disk
CUT_DIMS = 8  # most dimensions along which a tensor is split: a chunk has 2^dimensions corners, and all are counted

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Damaged(UsageError):
    """A checkpoint whose content differs from what was written: an older one may be used instead.

    A disk that fails to read, and a format that is too new, raise a plain UsageError: the checkpoint itself may be whole.
    """


@dataclass(frozen=True)
class FileEntry:
    """A file's expected size in bytes and zlib crc32."""

    bytes: int
    crc32: int


@dataclass(frozen=True)
class TensorEntry:
    """`dtype` as safetensors spells it; `shape` is that of the whole tensor; the chunks fill it without overlap."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...] | Grid

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize

    def key(self, name: str, chunk: Chunk) -> str:
        return chunk_key(name, self.shape, chunk.offsets, chunk.sizes)

    def overlapping(self, offset: Sequence[int], sizes: Sequence[int]) -> list[Chunk]:
        """The chunks that share an element with a rectangle."""
        if 0 in sizes:
            return []
        if isinstance(self.chunks, Grid):
            return self.chunks.overlapping(offset, sizes)
        return [c for c in self.chunks if all(o < b + m and b < o + n for o, n, b, m in zip(offset, sizes, c.offsets, c.sizes))]

    def files(self) -> set[str]:
        """Names of the files that hold the tensor."""
        if isinstance(self.chunks, Grid):
            return {self.chunks.names[n] for n in self.chunks.file_numbers()}
        return {c.file for c in self.chunks}

    def plain(self, number: Mapping[str, int]) -> dict[str, Any]:
        """As in index.json; `number`: of each file."""
        made = self.chunks.numbered(number) if isinstance(self.chunks, Grid) else grid_of(self.shape, self.chunks, number)
        if made is None:
            chunks = [{"offsets": c.offsets, "sizes": c.sizes, "file": c.file} for c in self.chunks]
            return {"dtype": self.dtype, "shape": self.shape, "chunks": chunks}
        edges = [edge.step if isinstance(edge, range) else edge for edge in made.edges]
        return {"dtype": self.dtype, "shape": self.shape, "parts": edges, "files": made.runs}


@dataclass(frozen=True)
class Index:
    """The table of contents of the checkpoint in `folder`."""

    folder: Path
    version: int
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    @classmethod
    def made(cls, folder: Path, files: dict[str, FileEntry], tensors: dict[str, TensorEntry]) -> Index:
        """Of the oldest version that can say it, so that older programs read what they can."""
        return cls(folder, 2 if any(many(t.chunks) for t in tensors.values()) else 1, files, tensors)

    def to_json(self) -> str:
        number = {name: i for i, name in enumerate(self.files)} if self.version > 1 else {}
        content = {
            "version": self.version,
            "files": {name: {"bytes": f.bytes, "crc32": f.crc32} for name, f in self.files.items()},
            "tensors": {name: t.plain(number) for name, t in self.tensors.items()},
        }
        return json.dumps(content, separators=(",", ":"))


def chunk_key(name: str, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> str:
    """A chunk's key in its shard: the tensor's name if it is the whole tensor, so that any safetensors reader finds it."""
    return name if sizes == shape else f"{name}@{','.join(map(str, offsets))}"


def read_index(folder: str | Path) -> Index:
    """Reads and checks a step folder's index.json. Raises Damaged naming the file and what is wrong with it, and UsageError if the disk
    cannot read it or it has another version.
    """
    folder = Path(folder)
    path = folder / INDEX
    raw = read_json(path)
    version = raw.get("version")
    while type(version) is int and version in MIGRATIONS:
        raw = MIGRATIONS[version](raw)
        version = raw.get("version")
    if type(version) is not int or version not in VERSIONS:
        kind = UsageError if type(version) is int else Damaged
        raise kind(
            f"{path} has format version {version!r} but this program reads {', '.join(map(str, [*MIGRATIONS, *VERSIONS]))}: "
            "read it with the version of megascale that wrote it"
        )
    try:
        index = _parse(folder, raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"{path} is damaged ({type(error).__name__}: {error}): use an older checkpoint") from None
    stored = dict.fromkeys(index.files, 0)
    in_grids = np.zeros(len(stored), np.int64)
    for name, tensor in index.tensors.items():
        problem = covering_problem(tensor) or _place_problem(tensor, stored, in_grids)
        if problem:
            raise Damaged(f"{path} is damaged: the chunks of {name} {problem}; use an older checkpoint")
    for name, size in zip(stored, in_grids.tolist()):
        stored[name] += size
    for name, size in stored.items():
        if size > index.files[name].bytes:
            raise Damaged(
                f"{path} is damaged: {name} should have {index.files[name].bytes} bytes and its chunks {size}; use an older checkpoint"
            )
    return index


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises Damaged if there is none, UsageError if the disk cannot read it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would block
            raise Damaged(f"{path} is not a file: {path.parent} is not a checkpoint, or not a whole one")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"there is no {path}: {path.parent} is not a checkpoint, or not a whole one") from None
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror or error}), so its content is unknown: check the disk and the read permissions "
            "there, then run the same command again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} cannot be read ({error}): the checkpoint is damaged, use an older one") from None
    if not isinstance(raw, dict):
        raise Damaged(f"{path} holds a {type(raw).__name__} instead of an object: the checkpoint is damaged, use an older one")
    return raw


def size_problems(index: Index) -> list[str]:
    """Files that are missing or have another size."""
    problems = []
    for name, entry in sorted(index.files.items()):
        path = index.folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != entry.bytes:
            problems.append(f"{path} has {path.stat().st_size} bytes but {INDEX} says {entry.bytes}")
    return problems


def file_problem(index: Index, name: str) -> str | None:
    """What is wrong with a file of the checkpoint: missing, or another size or checksum; None if it is whole.

    Raises UsageError if the disk cannot read it.
    """
    path, entry = index.folder / name, index.files[name]
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{path} has {size} bytes but {INDEX} says {entry.bytes}"
        crc = 0
        with path.open("rb", buffering=0) as file:
            while block := file.read(1 << 22):
                crc = zlib.crc32(block, crc)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{path} cannot be read: {error.strerror or error}"
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror or error}), so its content is unknown: check the disk and the read permissions "
            "there, then run the same command again"
        ) from None
    if crc != entry.crc32:
        return f"{path} has checksum {crc:08x} but {INDEX} says {entry.crc32:08x}: its content has changed"
    return None


def covering_problem(tensor: TensorEntry) -> str | None:
    """Chunks must lie inside the tensor, not overlap, and fill it; None if they do. Those of a grid cannot do otherwise."""
    if isinstance(tensor.chunks, Grid):
        return None
    volume = 0
    for c in tensor.chunks:
        if len(c.offsets) != len(tensor.shape) or len(c.sizes) != len(tensor.shape):
            return "have another number of dimensions"
        if any(o + n > s for o, n, s in zip(c.offsets, c.sizes, tensor.shape)):
            return "reach beyond its shape"
        if 0 in c.sizes:
            return "are empty"
        volume += math.prod(c.sizes)
    if volume != tensor.numel:
        return f"hold {volume} of its {tensor.numel} elements" if volume < tensor.numel else "overlap"
    cut = [d for d, size in enumerate(tensor.shape) if any(c.sizes[d] != size for c in tensor.chunks)]
    if len(cut) > CUT_DIMS:
        return f"split it along {len(cut)} dimensions, but at most {CUT_DIMS} are supported"
    return None if _fill(tensor, cut) else "overlap"


def _fill(tensor: TensorEntry, cut: list[int]) -> bool:
    """Whether every element lies in exactly one chunk, in time linear in the number of chunks.

    The number of chunks at each position is determined by its differences along all dimensions, which are nonzero only at chunk corners,
    with alternating signs. So it is 1 everywhere exactly if the signed corners are those of the whole tensor.
    """
    corners: dict[tuple[int, ...], int] = {}
    whole = Chunk((0,) * len(tensor.shape), tensor.shape, "")
    for chunk, sign in [*((c, 1) for c in tensor.chunks), (whole, -1)] if tensor.numel else []:
        for ends in itertools.product((0, 1), repeat=len(cut)):
            corner = tuple(chunk.offsets[d] + end * chunk.sizes[d] for d, end in zip(cut, ends))
            corners[corner] = corners.get(corner, 0) + (-sign if sum(ends) % 2 else sign)
    return not any(corners.values())


def _place_problem(tensor: TensorEntry, stored: dict[str, int], in_grids: np.ndarray) -> str | None:
    """Adds the chunks' bytes to those of their files in `stored`, a grid's to `in_grids` in the files' order; every chunk's file must be
    listed.
    """
    if isinstance(tensor.chunks, Grid):
        elements = np.zeros_like(in_grids)
        tensor.chunks.add_sizes(elements)
        in_grids += elements * DTYPES[tensor.dtype].itemsize
        return None
    for c in tensor.chunks:
        if c.file not in stored:
            return f"are in {c.file}, which the index does not list"
        stored[c.file] += math.prod(c.sizes) * DTYPES[tensor.dtype].itemsize
    return None


def _parse(folder: Path, raw: dict[str, Any]) -> Index:
    files = {name: FileEntry(_whole(f["bytes"]), _whole(f["crc32"])) for name, f in raw["files"].items()}
    for name in files:
        if name != TRAINER and not (SHARD_NAME.fullmatch(name) and len(name) <= LONGEST):
            raise ValueError(f"{name!r} is not the name of a shard file in this folder")
    if TRAINER not in files:
        raise ValueError(f"{TRAINER} is not listed")
    tensors, names = {}, tuple(files)
    for name, t in raw["tensors"].items():
        if name == "__metadata__":
            raise ValueError("a tensor has a reserved name, __metadata__")
        if t["dtype"] not in DTYPES:
            raise ValueError(f"unknown dtype {t['dtype']!r} of {name}")
        shape = _sizes(t["shape"])
        if "parts" in t:
            chunks: tuple[Chunk, ...] | Grid = read_grid(shape, t["parts"], t["files"], names)
        else:
            chunks = tuple(Chunk(_sizes(c["offsets"]), _sizes(c["sizes"]), _text(c["file"])) for c in t["chunks"])
        if math.prod(shape) * DTYPES[t["dtype"]].itemsize > LARGEST:
            raise ValueError(f"the shape {shape} of {name} is beyond any memory")
        tensors[name] = TensorEntry(t["dtype"], shape, chunks)
    return Index(folder, raw["version"], files, tensors)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError(f"{value!r} is not a size")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is not a list of sizes")
    return tuple(_whole(v) for v in values)
