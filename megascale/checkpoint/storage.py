"""DCP's storage side: one safetensors file a rank, index.json and trainer.json, published by a rename.

A folder step-00000100 is whole or it does not exist: everything is written to .tmp-step-00000100, flushed to disk, renamed, and only then
named in `latest`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan
from torch.distributed.checkpoint.planner import LoadPlanner as AnyLoadPlanner
from torch.distributed.checkpoint.planner import SavePlanner as AnySavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megascale.checkpoint.index import DTYPE_NAMES, DTYPES, VERSION, Chunk, FileEntry, Index, TensorEntry
from megascale.checkpoint.shards import read_part, write_shard


def step_name(step: int) -> str:
    return f"step-{step:08d}"


class ShardWriter(StorageWriter):
    """Writes one checkpoint into `root`/step-N."""

    def __init__(self, root: Path, step: int, trainer: dict[str, Any]) -> None:
        self.root, self.step, self.trainer = root, step, trainer
        self.temporary = root / f".tmp-{step_name(step)}"

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between checkpoints."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All places are known from the start."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.root.mkdir(parents=True, exist_ok=True)
        for left_over in self.root.glob(".tmp-*"):
            shutil.rmtree(left_over, ignore_errors=True)  # of a save that was killed
        self.temporary.mkdir()
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: AnySavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        name = f"rank-{plan.storage_data:05d}.safetensors"
        tensors = [(_key(item.index), planner.resolve_data(item).detach().cpu()) for item in plan.items]  # type: ignore[union-attr]
        results: list[WriteResult] = []
        if tensors:
            entry = write_shard(self.temporary / name, tensors)
            results = [WriteResult(item.index, tensor.nbytes, (name, key, entry)) for item, (key, tensor) in zip(plan.items, tensors)]
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, FileEntry] = {}
        places: dict[MetadataIndex, tuple[str, str]] = {}
        for result in (r for rank in results for r in rank):
            name, key, entry = result.storage_data
            files[name], places[result.index] = entry, (name, key)
        tensors = {}
        for name, meta in metadata.state_dict_metadata.items():
            assert isinstance(meta, TensorStorageMetadata)
            chunks = tuple(Chunk(tuple(c.offsets), tuple(c.sizes), *places[MetadataIndex(name, c.offsets)]) for c in meta.chunks)
            tensors[name] = TensorEntry(DTYPE_NAMES[meta.properties.dtype], tuple(meta.size), chunks)
        _write(self.temporary / "trainer.json", json.dumps(self.trainer, indent=1))
        _write(self.temporary / "index.json", Index(VERSION, files, tensors).to_json())
        publish(self.root, self.temporary, self.step)


def publish(root: Path, temporary: Path, step: int) -> None:
    """Gives a finished temporary folder its name, then lets `latest` point to it."""
    _sync_folder(temporary)
    final = root / step_name(step)
    replaced = final.with_name(f".tmp-del-{final.name}")
    if final.exists():
        os.rename(final, replaced)
    os.rename(temporary, final)
    shutil.rmtree(replaced, ignore_errors=True)
    _sync_folder(root)
    pointer = root / ".latest.tmp"
    _write(pointer, final.name + "\n")
    os.replace(pointer, root / "latest")
    _sync_folder(root)


def remove(folder: Path) -> None:
    """Takes the name away first, so that nobody finds half a checkpoint."""
    doomed = folder.with_name(f".tmp-del-{folder.name}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


class ShardReader(StorageReader):
    """Reads a checkpoint whose index has been checked."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between checkpoints."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, tuple[str, str]] = {}
        for name, entry in self.index.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks]
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=DTYPES[entry.dtype]), torch.Size(entry.shape), chunks)
            for c in entry.chunks:
                places[MetadataIndex(name, torch.Size(c.offsets))] = (c.file, c.key)
        return Metadata(tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: AnyLoadPlanner) -> Future[None]:
        for item in plan.items:
            file, key = self.places[MetadataIndex(item.storage_index.fqn, item.storage_index.offset)]
            part = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths))
            data = read_part(self.folder / file, key, part, self.index.tensors[item.storage_index.fqn])
            target = planner.resolve_tensor(item)
            target.copy_(data)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _key(index: MetadataIndex) -> str:
    return f"{index.fqn}@{','.join(str(o) for o in index.offset or ())}"


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
