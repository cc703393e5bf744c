"""Pieces as PyTorch's distributed checkpointing (DCP) sees them, and its planners made strict.

DCP plans who writes what, drops duplicates and works out which stored rectangles a new layout needs. Storage is ours (`storage.py`).
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType

from megascale.checkpoint.index import DTYPE_NAMES
from megascale.comm.piece import Piece
from megascale.errors import UsageError

SAMPLED = 4096  # elements of a piece that replicas are compared by


class PieceView:
    """A Piece with the methods that DCP asks of a checkpointable object."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.piece.offset), torch.Size(self.piece.local.shape))

    def __create_write_items__(self, fqn: str, item: object) -> list[WriteItem]:
        p = self.piece
        if p.local.numel() == 0:
            return []
        data = TensorWriteData(self._chunk(), TensorProperties(dtype=p.local.dtype), torch.Size(p.shape))
        return [WriteItem(MetadataIndex(fqn, torch.Size(p.offset)), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if self.piece.local.numel() else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Part of DCP's protocol; our planners look pieces up themselves."""
        return self.piece.local


def views(state: dict[str, Piece]) -> dict[str, PieceView]:
    """Raises UsageError for entries that are no tensors or of a dtype that cannot be stored."""
    for name, piece in state.items():
        if not isinstance(piece, Piece) or not isinstance(piece.local, Tensor):
            raise UsageError(f"the state holds {name} = {piece!r}, which is no tensor: numbers belong in the trainer's JSON")
        if piece.local.dtype not in DTYPE_NAMES:
            raise UsageError(f"the state holds {name} of dtype {piece.local.dtype}, which safetensors cannot store")
    return {name: PieceView(piece) for name, piece in state.items()}


class SavePlanner(DefaultSavePlanner):
    """DCP's planner, which also refuses replicas that differ: one of them would be saved and the others silently lost."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        sums = {item.index: _sample_sum(self.state_dict[item.index.fqn].piece.local) for item in plan.items}
        return dataclasses.replace(plan, planner_data=sums)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].piece.local  # type: ignore[no-any-return]

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        seen: dict[MetadataIndex, tuple[int, int]] = {}
        for rank, plan in enumerate(all_plans):
            for index, value in plan.planner_data.items():
                first, other = seen.setdefault(index, (value, rank))
                if first != value:
                    raise UsageError(
                        f"{index.fqn} should be the same on ranks {other} and {rank}, and it differs: the run has diverged there, "
                        "go back to an earlier checkpoint"
                    )
        return super().create_global_plan([dataclasses.replace(p, planner_data=None) for p in all_plans])


class LoadPlanner(DefaultLoadPlanner):
    """DCP's planner that accepts only what fits exactly: keys, shapes, dtypes, and every local element read."""

    def __init__(self, where: str, prefix: str | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.where, self.prefix = where, prefix

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored = cast(dict[str, TensorStorageMetadata], self.metadata.state_dict_metadata)
        missing = sorted(n for n in self.state_dict if n not in stored)
        if missing:
            raise UsageError(f"{self.where} lacks {_list(missing)}: it was saved by another model or optimizer")
        for name, view in self.state_dict.items():
            have, local = stored[name], view.piece
            if tuple(have.size) != local.shape:
                raise UsageError(f"{name} has shape {list(have.size)} in {self.where} and {list(local.shape)} here: the model sizes differ")
            if have.properties.dtype != local.local.dtype:
                raise UsageError(
                    f"{name} is {have.properties.dtype} in {self.where} and {local.local.dtype} here: set precision.master as it was"
                )
        plan = super().create_local_plan()
        read: dict[str, int] = {}
        for item in plan.items:
            read[item.dest_index.fqn] = read.get(item.dest_index.fqn, 0) + math.prod(item.lengths)
        for name, view in self.state_dict.items():
            if read.get(name, 0) != view.piece.local.numel():
                raise UsageError(
                    f"{self.where} covers {read.get(name, 0)} of this rank's {view.piece.local.numel()} elements of {name}: it is damaged"
                )
        return dataclasses.replace(plan, planner_data=set(self.state_dict))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].piece.local  # type: ignore[no-any-return]

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        assert self.metadata is not None
        wanted = set().union(*(p.planner_data for p in global_plan))
        extra = sorted(
            n for n in self.metadata.state_dict_metadata if n not in wanted and (self.prefix is None or n.startswith(self.prefix))
        )
        if extra:
            raise UsageError(
                f"{self.where} also holds {_list(extra)}, which nobody here asks for: it was saved by another model or optimizer"
            )
        return super().create_global_plan([dataclasses.replace(p, planner_data=None) for p in global_plan])


def _sample_sum(tensor: Tensor) -> int:
    """A checksum of a piece from evenly spread elements: replicas that have drifted apart differ nearly everywhere."""
    flat = tensor.detach().reshape(-1)
    part = flat[:: max(1, flat.numel() // SAMPLED)].contiguous().view(torch.uint8).cpu()
    return zlib.crc32(part.numpy().data)


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
