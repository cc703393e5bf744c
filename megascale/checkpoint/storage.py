"""DCP's storage side: one safetensors file per rank, index.json and trainer.json, published by a rename.

A folder step-00000100 is whole or it does not exist: everything is written to .tmp-step-00000100, flushed to disk, renamed, and only then
named in `latest`.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan
from torch.distributed.checkpoint.planner import LoadPlanner as AnyLoadPlanner
from torch.distributed.checkpoint.planner import SavePlanner as AnySavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megascale.checkpoint.folders import publish, step_name
from megascale.checkpoint.index import DTYPES, INDEX, TRAINER, FileEntry, Index, TensorEntry, chunk_key
from megascale.checkpoint.shards import FilePart, StoredShard, check_parts, read_parts, shard_name, write_shard
from megascale.errors import UsageError
from megascale.files import discard, write_durably

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # full disk, quota, file-size limit of the process


class ShardWriter(StorageWriter):
    """Writes one checkpoint into `root`/step-N.

    prepare  called on the coordinator before anything is written: raises if the run no longer owns the folder; returns what the
             checkpoint holds
    explain  (root, bytes of the checkpoint) → message about the space that a full disk lacks
    """

    def __init__(
        self,
        root: Path,
        step: int,
        trainer: dict[str, Any],
        prepare: Callable[[], dict[str, TensorEntry]],
        explain: Callable[[Path, int], str] | None = None,
    ) -> None:
        self.root, self.step, self.trainer = root, step, trainer
        self.prepare, self.explain = prepare, explain
        self.tensors: dict[str, TensorEntry] = {}
        self.nbytes = 0
        self.temporary = root / f".tmp-{step_name(step)}"

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between checkpoints."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        try:
            self.trainer_json = json.dumps(self.trainer, indent=1)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"the trainer's state cannot be written as JSON ({error}): keep plain numbers, texts, lists and dicts in it"
            ) from None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.tensors = self.prepare()
        self.nbytes = sum(entry.nbytes for entry in self.tensors.values())
        with self._told():
            self.root.mkdir(parents=True, exist_ok=True)
            for left_over in self.root.glob(".tmp-*"):
                discard(left_over)  # from a save that was killed
            self.temporary.mkdir()
        return [dataclasses.replace(plan, storage_data=(rank, self.nbytes)) for rank, plan in enumerate(plans)]

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Adds to a full-disk error how much is free and what would fit."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL or self.explain is None or not self.nbytes:
                raise
            raise OSError(error.errno, f"{error.strerror}; {self.explain(self.root, self.nbytes)}", error.filename) from None

    def write_data(self, plan: SavePlan, planner: AnySavePlanner) -> Future[list[WriteResult]]:
        tensors = []
        for item in plan.items:
            meta = item.tensor_data
            assert meta is not None
            sizes = tuple(meta.chunk.sizes)
            if 0 not in sizes:
                key = chunk_key(item.index.fqn, tuple(meta.size), tuple(meta.chunk.offsets), sizes)
                tensors.append(StoredShard(key, meta.properties.dtype, sizes, (planner.resolve_data(item),)))  # type: ignore[arg-type]
        results: list[WriteResult] = []
        if tensors:
            rank, self.nbytes = plan.storage_data
            name = shard_name(rank)
            with self._told():
                entry = write_shard(self.temporary / name, tensors)
            # One result per file: the coordinator's plan already has the location of each tensor.
            results = [WriteResult(MetadataIndex(name), entry.bytes, entry)]
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, after all ranks have written. Raises OSError."""
        with self._told():
            self._finish(metadata, results)

    def _finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = {r.index.fqn: r.storage_data for rank in results for r in rank}
        for name, entry in files.items():
            path = self.temporary / name
            if not path.is_file() or path.stat().st_size != entry.bytes:
                raise OSError(f"{path}, written by another rank, is not visible here: run.dir must be on a disk that all nodes share")
        text = self.trainer_json.encode()
        files[TRAINER] = FileEntry(len(text), zlib.crc32(text))
        write_durably(self.temporary / TRAINER, text)
        write_durably(self.temporary / INDEX, Index.made(self.temporary, files, self.tensors).to_json().encode())
        publish(self.root, self.temporary, self.step)


class ShardReader(StorageReader):
    """Reads a checkpoint whose index has been checked."""

    def __init__(self, index: Index) -> None:
        self.index = index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between checkpoints."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Without chunks: over thousands of ranks they are millions, and a rank asks for a few (`overlapping`)."""
        return Metadata(
            {
                name: TensorStorageMetadata(TensorProperties(dtype=DTYPES[entry.dtype]), torch.Size(entry.shape), [])
                for name, entry in self.index.tensors.items()
            }
        )

    def overlapping(self, name: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """The chunks of a tensor that share an element with a rectangle."""
        found = self.index.tensors[name].overlapping(offset, sizes)
        return [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in found]

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the index was read before."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def check(self, plan: LoadPlan) -> None:
        """Compares the shards' headers with the index for everything that `plan` reads. Raises UsageError."""
        by_file: dict[str, list[FilePart]] = {}
        for item in plan.items:
            file, part = self._part(item)
            by_file.setdefault(file, []).append(part)
        for file, parts in by_file.items():
            check_parts(self.index.folder / file, parts)

    def read_data(self, plan: LoadPlan, planner: AnyLoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[FilePart, torch.Tensor]]] = {}
        for item in plan.items:
            file, part = self._part(item)
            by_file.setdefault(file, []).append((part, planner.resolve_tensor(item)))
        for file, wanted in by_file.items():
            read_parts(self.index.folder / file, wanted)
        return _done(None)

    def _part(self, item: ReadItem) -> tuple[str, FilePart]:
        """The file of an item and the part of its chunk."""
        name, offsets = item.storage_index.fqn, item.storage_index.offset
        assert offsets is not None
        entry = self.index.tensors[name]
        chunk = next(c for c in entry.overlapping(offsets, (1,) * len(offsets)) if c.offsets == tuple(offsets))
        begin, sizes = tuple(item.storage_offsets), tuple(item.lengths)
        return chunk.file, FilePart(entry.key(name, chunk), DTYPES[entry.dtype], chunk.sizes, begin, sizes)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
