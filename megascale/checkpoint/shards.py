"""Shard files: safetensors, written as a stream with their checksum, read by slices."""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megascale.checkpoint.index import DTYPE_NAMES, DTYPES, FileEntry, Index, TensorEntry
from megascale.errors import UsageError

BLOCK = 1 << 24  # bytes written and summed at once


def write_shard(path: Path, tensors: list[tuple[str, Tensor]]) -> FileEntry:
    """Writes named CPU tensors as one safetensors file, on disk when this returns. Raises OSError."""
    header: dict[str, object] = {}
    position = 0
    for key, tensor in tensors:
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    crc = size = 0
    with path.open("wb", buffering=0) as file:
        for part in _parts(struct.pack("<Q", len(text)) + text, tensors):
            crc = zlib.crc32(part, crc)
            size += len(part)
            while part:
                part = part[file.write(part) :]
        os.fsync(file.fileno())
    return FileEntry(size, crc)


def _parts(head: bytes, tensors: list[tuple[str, Tensor]]) -> Iterable[memoryview]:
    yield memoryview(head)
    for _, tensor in tensors:
        data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        for start in range(0, len(data), BLOCK):
            yield data[start : start + BLOCK]


def read_slice(folder: Path, index: Index, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The rectangle at `offset` of size `shape` of a stored tensor, read from the chunks it touches and from nothing else.

    Raises UsageError when the tensor is not there or the rectangle reaches beyond it.
    """
    if name not in index.tensors:
        raise UsageError(f"{folder} holds no tensor {name}")
    entry = index.tensors[name]
    if len(offset) != len(entry.shape) or any(o + n > s for o, n, s in zip(offset, shape, entry.shape)):
        raise UsageError(f"{name} in {folder} has shape {list(entry.shape)}: there is no {list(shape)} at {list(offset)}")
    out = torch.empty(shape, dtype=DTYPES[entry.dtype])
    filled = 0
    for chunk in entry.chunks:
        low = [max(a, b) for a, b in zip(offset, chunk.offsets)]
        high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, chunk.offsets, chunk.sizes)]
        if any(x >= y for x, y in zip(low, high)):
            continue
        source = tuple(slice(x - b, y - b) for x, y, b in zip(low, high, chunk.offsets))
        target = tuple(slice(x - a, y - a) for x, y, a in zip(low, high, offset))
        out[target] = read_part(folder / chunk.file, chunk.key, source, entry)
        filled += math.prod(y - x for x, y in zip(low, high))
    if filled != out.numel():
        raise UsageError(f"{name} in {folder} has {filled} of the {out.numel()} elements at {list(offset)}: the checkpoint is damaged")
    return out


def read_part(path: Path, key: str, part: tuple[slice, ...], entry: TensorEntry) -> Tensor:
    """Part of one stored chunk. The handle is dropped at once, so that mapped memory does not grow."""
    try:
        with safe_open(str(path), framework="pt") as file:
            data = file.get_slice(key)[part] if part else file.get_tensor(key)
    except Exception as error:  # safetensors raises its own type, and OSError
        raise UsageError(f"{path} cannot be read: {error}") from None
    if data.dtype != DTYPES[entry.dtype]:
        raise UsageError(f"{path} stores {key} as {data.dtype} and the index says {DTYPES[entry.dtype]}: the checkpoint is damaged")
    return data
