"""Writes checkpoints and other safetensors files slab by slab, for tools whose tensors do not fit into memory.

The plan of a file is plain data, and its numbers are a function of (name, offset, shape), like `shards.read_slice`. So the bytes do not
depend on the number of workers or the size of slabs, and a killed run can keep the files that it had finished.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale.checkpoint.folders import publish, step_name
from megascale.checkpoint.grid import Chunk
from megascale.checkpoint.index import DTYPE_NAMES, INDEX, TRAINER, FileEntry, Index, TensorEntry, chunk_key
from megascale.checkpoint.shards import StoredShard, write_shard
from megascale.errors import UsageError
from megascale.files import discard, write_durably
from megascale.sizes import byte_words

ReadSlice = Callable[[str, tuple[int, ...], tuple[int, ...]], Tensor]
"""(name, offset, shape) → that rectangle of the tensor. Several workers pickle it: use a module-level function on plain data."""

Progress = Callable[[int, int], None]
"""Called with (bytes on disk, final bytes) a few times per second."""

POLL = 0.25  # seconds between two progress checks
MARK = ".done"  # next to a finished file, until all are finished


@dataclass(frozen=True)
class Target:
    """A whole tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SliceOfTensor:
    """A rectangle of the tensor `name`, stored as `key` and produced in slabs."""

    key: str
    name: str
    dtype: torch.dtype
    offset: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class FilePlan:
    """One safetensors file: its name, its contents in order, and texts for its header."""

    name: str
    blocks: tuple[SliceOfTensor, ...]
    metadata: tuple[tuple[str, str], ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self.blocks)


def write_streamed(
    root: str | Path,
    step: int,
    targets: list[Target],
    produce: ReadSlice,
    trainer: dict[str, Any],
    *,
    stamp: str,
    workers: int = 1,
    slab_bytes: int = 256 << 20,
    file_bytes: int = 1 << 30,
    progress: Progress | None = None,
) -> Path:
    """Writes the checkpoint `root`/step-N of `targets` and lets `latest` name it; returns the folder.

    stamp       identifies the source and everything that `produce` depends on: an unfinished folder with the same stamp is completed
    workers     writing processes; the bytes do not depend on their number
    slab_bytes  bytes per call of `produce`: memory is about three slabs per worker
    file_bytes  bytes per file; a larger tensor is stored as several chunks of rows

    Raises UsageError if the disk has no room or `produce` refuses, OSError for a disk error: then nothing is left. An interrupt or a kill
    leaves a folder named `.tmp-…`.
    """
    root = Path(root)
    temporary = root / f".tmp-{step_name(step)}"
    files = pack(targets, file_bytes)
    made_root = not root.exists()
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        entries = write_files(temporary, files, produce, stamp=stamp, workers=workers, slab_bytes=slab_bytes, progress=progress)
        text = json.dumps(trainer, indent=1).encode()
        entries[TRAINER] = FileEntry(len(text), zlib.crc32(text))
        write_durably(temporary / TRAINER, text)
        chunks: dict[str, list[Chunk]] = {t.name: [] for t in targets}
        for file in files:
            for block in file.blocks:
                chunks[block.name].append(Chunk(block.offset, block.sizes, file.name))
        tensors = {t.name: TensorEntry(DTYPE_NAMES[t.dtype], t.shape, tuple(chunks[t.name])) for t in targets}
        write_durably(temporary / INDEX, Index.made(temporary, entries, tensors).to_json().encode())
        publish(root, temporary, step)
    except Exception:  # any error of `produce`
        discard(temporary)
        if made_root and root.exists():
            root.rmdir()
        raise
    return root / step_name(step)


def pack(targets: list[Target], file_bytes: int) -> list[FilePlan]:
    """Distributes targets in order over files of at most `file_bytes`, unless a single row is larger."""
    files: list[list[SliceOfTensor]] = []
    room = 0
    for target in targets:
        if 0 in target.shape:
            continue
        for offset, sizes in slabs((0,) * len(target.shape), target.shape, max(1, file_bytes // target.dtype.itemsize)):
            block = SliceOfTensor(chunk_key(target.name, target.shape, offset, sizes), target.name, target.dtype, offset, sizes)
            if not files or block.nbytes > room:
                files.append([])
                room = file_bytes
            files[-1].append(block)
            room -= block.nbytes
    return [FilePlan(f"part-{number:05d}.safetensors", tuple(blocks)) for number, blocks in enumerate(files)]


def slabs(offset: tuple[int, ...], sizes: tuple[int, ...], most: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Splits a rectangle into consecutive ones of at most `most` elements."""
    inner = math.prod(sizes[1:])
    if not sizes or inner * sizes[0] <= most:
        yield offset, sizes
    elif inner <= most:
        count = most // inner
        for start in range(0, sizes[0], count):
            yield (offset[0] + start, *offset[1:]), (min(count, sizes[0] - start), *sizes[1:])
    else:
        for row in range(sizes[0]):
            for o, s in slabs(offset[1:], sizes[1:], most):
                yield (offset[0] + row, *o), (1, *s)


def write_files(
    folder: Path,
    files: list[FilePlan],
    produce: ReadSlice,
    *,
    stamp: str,
    workers: int = 1,
    slab_bytes: int = 256 << 20,
    progress: Progress | None = None,
) -> dict[str, FileEntry]:
    """Writes `files` into the existing `folder` and returns their entries. Arguments and errors as in `write_streamed`.

    Files that a killed run with the same stamp had finished are kept; anything else in the folder is removed.
    """
    marks = {f.name: hashlib.sha256(f"{stamp}\n{f}".encode()).hexdigest() for f in files}
    _keep_finished(folder, marks)
    total = sum(f.nbytes for f in files)
    missing, free = total - _written(folder), shutil.disk_usage(folder).free
    if missing > free:
        raise UsageError(f"{folder} needs {byte_words(missing)} more but its disk has {byte_words(free)} free: make room there")
    pool: Executor
    if workers == 1:
        pool = ThreadPoolExecutor(1)
    else:
        threads = max(1, (os.cpu_count() or 1) // workers)
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,))
    with pool:
        jobs = {f.name: pool.submit(_write_file, folder, f, produce, slab_bytes, marks[f.name]) for f in files}
        try:
            pending: Any = set(jobs.values())
            while pending:
                done, pending = wait(pending, POLL, FIRST_EXCEPTION)
                for job in done:
                    job.result()
                if progress is not None:
                    progress(min(total, _written(folder)), total)
        except BrokenProcessPool:
            raise UsageError(
                f"one of the {workers} workers that write {folder} was killed (out of memory?): run with fewer workers or smaller slabs"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for name in marks:
        (folder / (name + MARK)).unlink()
    return {name: job.result() for name, job in jobs.items()}


def _keep_finished(folder: Path, marks: dict[str, str]) -> None:
    kept = set()
    for name, mark in marks.items():
        if _finished(folder, name, mark) is not None:
            kept |= {name, name + MARK}
    for path in folder.iterdir():
        if path.name not in kept:
            discard(path)


def _finished(folder: Path, name: str, mark: str) -> FileEntry | None:
    """The entry of a finished file, or None."""
    try:
        saved = json.loads((folder / (name + MARK)).read_text())
        size = (folder / name).stat().st_size
    except (OSError, ValueError):
        return None
    if saved["mark"] != mark or saved["bytes"] != size:
        return None
    return FileEntry(saved["bytes"], saved["crc32"])


def _written(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def _write_file(folder: Path, file: FilePlan, produce: ReadSlice, slab_bytes: int, mark: str) -> FileEntry:
    kept = _finished(folder, file.name, mark)
    if kept is not None:
        return kept
    tensors = [StoredShard(b.key, b.dtype, b.sizes, _produced(b, produce, slab_bytes)) for b in file.blocks]
    entry = write_shard(folder / file.name, tensors, dict(file.metadata))
    write_durably(folder / (file.name + MARK), json.dumps({"mark": mark, "bytes": entry.bytes, "crc32": entry.crc32}).encode())
    return entry


def _produced(block: SliceOfTensor, produce: ReadSlice, slab_bytes: int) -> Iterator[Tensor]:
    for offset, sizes in slabs(block.offset, block.sizes, max(1, slab_bytes // block.dtype.itemsize)):
        slab = produce(block.name, offset, sizes)
        if tuple(slab.shape) != sizes or slab.dtype != block.dtype:
            raise AssertionError(f"{block.name} at {offset}: made {slab.dtype} {list(slab.shape)} instead of {block.dtype} {list(sizes)}")
        yield slab
