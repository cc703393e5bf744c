"""Shard files: safetensors, streamed to disk with a checksum, read by slices."""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megascale.checkpoint.index import DTYPE_NAMES, DTYPES, FileEntry, Index, read_index
from megascale.errors import UsageError

BLOCK = 1 << 22  # bytes per write and checksum update
SMALL = 1 << 16  # tensors below this many bytes are gathered into blocks, since each block costs a thread switch
FLUSH = 1 << 25  # bytes after which writeback starts, instead of at the end
HELD = 1 << 30  # bytes read through one handle: mapped pages count as resident memory until it is closed


@dataclass(frozen=True)
class StoredShard:
    """One tensor to write: its key in the shard, and its data as an iterator of consecutive parts."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Iterable[Tensor]


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def write_shard(path: Path, tensors: list[StoredShard], metadata: dict[str, str] | None = None) -> FileEntry:
    """Writes tensors as one safetensors file with `metadata` in its header, and flushes it to disk. Raises OSError naming the file.

    A second thread computes the checksum during the write, and writeback starts early: as fast as `dd`.
    """
    crc = size = flushed = 0
    try:
        with path.open("xb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
            for block in _blocks(_header(tensors, metadata), tensors):
                job = pool.submit(zlib.crc32, block, crc)
                size += len(block)
                rest = block
                while rest:
                    rest = rest[file.write(rest) :]
                crc = job.result()
                if size - flushed >= FLUSH and hasattr(os, "posix_fadvise"):
                    # Linux starts to write pages that it is asked to drop.
                    os.posix_fadvise(file.fileno(), flushed, size - flushed, os.POSIX_FADV_DONTNEED)
                    flushed = size
            os.fsync(file.fileno())
    except FileNotFoundError as error:
        raise OSError(error.errno, "the folder does not exist: does every node see the same run.dir?", str(path)) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return FileEntry(size, crc)


def _header(tensors: list[StoredShard], metadata: dict[str, str] | None) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for t in tensors:
        end = position + math.prod(t.shape) * t.dtype.itemsize
        header[t.key] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _blocks(head: bytes, tensors: Iterable[StoredShard]) -> Iterator[memoryview]:
    gathered = bytearray(head)
    for piece in (piece for t in tensors for piece in t.data):
        # Tensors on a device are copied one by one: a copy of the whole state may not fit into host memory.
        data = memoryview(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        if len(data) < SMALL:
            gathered += data
        if gathered and (len(gathered) >= BLOCK or len(data) >= SMALL):
            yield memoryview(gathered)
            gathered = bytearray()
        if len(data) >= SMALL:
            for start in range(0, len(data), BLOCK):
                yield data[start : start + BLOCK]
    if gathered:
        yield memoryview(gathered)


@dataclass(frozen=True)
class FilePart:
    """A rectangle of a stored chunk: `begin` and `sizes` count from the chunk's own corner."""

    key: str
    dtype: torch.dtype
    chunk_sizes: tuple[int, ...]
    begin: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


def read_parts(path: Path, wanted: list[tuple[FilePart, Tensor]]) -> None:
    """Copies parts of a shard into tensors of their sizes. Raises UsageError if the shard does not match the index."""
    start = 0
    while start < len(wanted):
        held = 0
        try:
            with safe_open(str(path), framework="pt") as file:
                while start < len(wanted) and held < HELD:
                    part, target = wanted[start]
                    target.copy_(_read_part(file, path, part))
                    held += part.nbytes
                    start += 1
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{path} cannot be read ({error}): the checkpoint is damaged, use an older one") from None


def check_parts(path: Path, parts: Iterable[FilePart]) -> None:
    """Compares a shard's header with its chunks in the index before anything is read from it."""
    try:
        with safe_open(str(path), framework="pt") as file:
            for part in parts:
                _stored(file, path, part)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read ({error}): the checkpoint is damaged, use an older one") from None


def _stored(file: Any, path: Path, part: FilePart) -> Any:
    """safetensors' lazy view of a chunk. Raises UsageError if its dtype or sizes differ from the index."""
    stored = file.get_slice(part.key)
    found = (stored.get_dtype(), list(stored.get_shape()))
    expected = (DTYPE_NAMES[part.dtype], list(part.chunk_sizes))
    if found != expected:
        raise UsageError(
            f"{path} stores {part.key} as {found[0]} {found[1]} but the index says {expected[0]} {expected[1]}: "
            "the checkpoint is damaged, use an older one"
        )
    return stored


def _read_part(file: Any, path: Path, part: FilePart) -> Tensor:
    stored = _stored(file, path, part)
    if not part.sizes:
        return file.get_tensor(part.key)  # type: ignore[no-any-return]
    return stored[tuple(slice(b, b + n) for b, n in zip(part.begin, part.sizes))]  # type: ignore[no-any-return]


def read_slice(source: str | Path | Index, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The rectangle of size `shape` at `offset` of a stored tensor, in this process alone.

    source  a step folder, or its Index, to avoid reading it again

    Reads only the chunks that it needs and keeps no file open. Raises UsageError if there is no such tensor, or the rectangle is not inside
    it or not fully stored.
    """
    index = source if isinstance(source, Index) else read_index(source)
    if name not in index.tensors:
        raise UsageError(f"{index.folder} holds no tensor {name}")
    entry = index.tensors[name]
    inside = len(offset) == len(shape) == len(entry.shape)
    if not inside or any(o < 0 or n < 0 or o + n > s for o, n, s in zip(offset, shape, entry.shape)):
        raise UsageError(f"{name} in {index.folder} has shape {list(entry.shape)}: there is no {list(shape)} at {list(offset)}")
    dtype = DTYPES[entry.dtype]
    out = torch.empty(shape, dtype=dtype)
    filled = 0
    for chunk in entry.overlapping(offset, shape):
        low = [max(a, b) for a, b in zip(offset, chunk.offsets)]
        high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, chunk.offsets, chunk.sizes)]
        sizes = tuple(y - x for x, y in zip(low, high))
        begin = tuple(x - b for x, b in zip(low, chunk.offsets))
        target = out[tuple(slice(x - a, y - a) for x, y, a in zip(low, high, offset))]
        read_parts(index.folder / chunk.file, [(FilePart(entry.key(name, chunk), dtype, chunk.sizes, begin, sizes), target)])
        filled += math.prod(sizes)
    if filled != out.numel():
        raise UsageError(
            f"{name} in {index.folder} stores {filled} of the {out.numel()} elements at {list(offset)}: "
            "the checkpoint is damaged, use an older one"
        )
    return out
