"""A checkpoint's table of contents, index.json: what it holds, in which files, and how to tell that they are whole.

Everything in it is checked before it is believed; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megascale.errors import UsageError

VERSION = 1
# How to read an older index.json: version → function that makes it one version newer.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

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
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    crc32: int


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor, stored in `file` under `key`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True)
class TensorEntry:
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Index:
    version: int
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


def read_index(folder: Path) -> Index:
    """Reads and checks index.json. Raises UsageError naming the file and what is wrong with it."""
    path = folder / "index.json"
    raw = read_json(path)
    version = raw.get("version")
    while isinstance(version, int) and version in MIGRATIONS:
        raw = MIGRATIONS[version](raw)
        version = raw.get("version")
    if version != VERSION:
        raise UsageError(
            f"{path} has format version {version!r}, and this program reads up to {VERSION}: use the version of megascale that wrote it"
        )
    try:
        index = _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}: {error}): use an older checkpoint") from None
    for name, tensor in index.tensors.items():
        problem = _covering_problem(tensor, index.files)
        if problem:
            raise UsageError(f"{path} is damaged: the chunks of {name} {problem}; use an older checkpoint")
    return index


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or UsageError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no {path}: {path.parent} is not a checkpoint, or not a whole one") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): the checkpoint is damaged, use an older one") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path} holds a {type(raw).__name__} instead of an object: the checkpoint is damaged, use an older one")
    return raw


def file_problem(folder: Path, name: str, entry: FileEntry) -> str | None:
    """What is wrong with a file of the checkpoint: missing, of another size, of another checksum; None when it is whole."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{path} has {size} bytes and the index says {entry.bytes}"
        crc = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    return None if crc == entry.crc32 else f"{path} has checksum {crc:08x} and the index says {entry.crc32:08x}: its content has changed"


def _parse(raw: dict[str, Any]) -> Index:
    files = {str(n): FileEntry(_whole(f["bytes"]), _whole(f["crc32"])) for n, f in raw["files"].items()}
    for name in files:
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"the file name {name!r} leads out of the folder")
    tensors = {}
    for name, t in raw["tensors"].items():
        if t["dtype"] not in DTYPES:
            raise ValueError(f"unknown dtype {t['dtype']!r} of {name}")
        chunks = tuple(Chunk(_sizes(c["offsets"]), _sizes(c["sizes"]), str(c["file"]), str(c["key"])) for c in t["chunks"])
        tensors[str(name)] = TensorEntry(t["dtype"], _sizes(t["shape"]), chunks)
    return Index(raw["version"], files, tensors)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list of sizes")
    return tuple(_whole(v) for v in values)


def _covering_problem(tensor: TensorEntry, files: dict[str, FileEntry]) -> str | None:
    """Chunks must lie inside, not overlap, and fill the tensor."""
    volume = 0
    for c in tensor.chunks:
        if c.file not in files:
            return f"are in {c.file}, which the index does not list"
        if len(c.offsets) != len(tensor.shape) or len(c.sizes) != len(tensor.shape):
            return "have another number of dimensions"
        if any(o + n > s for o, n, s in zip(c.offsets, c.sizes, tensor.shape)):
            return "reach beyond its shape"
        volume += math.prod(c.sizes)
    if volume != tensor.numel:
        return f"hold {volume} of its {tensor.numel} elements"
    # Sorted along the first dimension, only chunks whose rows still overlap can collide.
    active: list[Chunk] = []
    for c in sorted(tensor.chunks, key=lambda c: c.offsets):
        active = [a for a in active if not a.offsets or a.offsets[0] + a.sizes[0] > c.offsets[0]]
        if any(all(x < y + n and y < x + m for x, m, y, n in zip(a.offsets, a.sizes, c.offsets, c.sizes)) for a in active):
            return "overlap"
        active.append(c)
    return None
