"""Adapts pieces to PyTorch's distributed checkpointing (DCP), with stricter planners.

DCP plans which rank writes what, drops duplicates and computes which stored rectangles a new layout needs. Storage is ours (`storage.py`).
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.metadata import TensorStorageMetadata as TensorMeta
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megascale.checkpoint.index import DTYPE_NAMES, TensorEntry
from megascale.checkpoint.joining import Held, Joined, join, packed
from megascale.comm.piece import Piece
from megascale.errors import UsageError

SUMMED = 1024  # 8-byte words per row of a replica's checksum


class ReplicasDiffer(UsageError):
    """Replicas on several ranks differ: the run has diverged."""


class PieceView:
    """A Piece with the methods that DCP requires of a checkpointable object."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.piece.offset), torch.Size(self.piece.local.shape))

    def __create_write_items__(self, fqn: str, item: object) -> list[WriteItem]:
        p, chunk = self.piece, self._chunk()
        if math.prod(p.shape) == 0:
            # An empty tensor stores only its name: all ranks report the same chunk, however they split it.
            chunk = ChunkStorageMetadata(torch.Size([0] * len(p.shape)), torch.Size(p.shape))
        elif p.local.numel() == 0:
            return []
        data = TensorWriteData(chunk, TensorProperties(dtype=p.local.dtype), torch.Size(p.shape))
        return [WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if self.piece.local.numel() else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.piece.local.detach()


def views(state: dict[str, Piece]) -> dict[str, PieceView]:
    """Raises UsageError for an entry that is not a tensor, cannot be stored, or lies outside its tensor."""
    for name, piece in state.items():
        if not isinstance(piece, Piece) or not isinstance(piece.local, Tensor):
            raise UsageError(f"the state holds {name} = {piece!r}, which is not a tensor: numbers belong in the trainer's JSON")
        if piece.local.dtype not in DTYPE_NAMES:
            raise UsageError(f"the state holds {name} of dtype {piece.local.dtype}, which cannot be stored: convert it first")
        if name == "__metadata__":
            raise UsageError("the state holds a tensor named __metadata__, which safetensors reserves: rename it")
        inside = len(piece.shape) == len(piece.offset) == piece.local.ndim
        if not inside or any(o < 0 or o + n > s for o, n, s in zip(piece.offset, piece.local.shape, piece.shape)):
            raise UsageError(
                f"the piece {list(piece.local.shape)} at {list(piece.offset)} of {name} does not lie inside its shape {list(piece.shape)}"
            )
    return {name: PieceView(piece) for name, piece in state.items()}


@dataclass
class PlanCache:
    """The plan of the last complete save on this rank; the next save plans only what has changed.

    DCP caches in class attributes, shared by all planners of a process; this cache belongs to one Checkpointer.
    """

    held: list[Held] | None = None
    final: SavePlan | None = None
    # On the coordinator only: what every rank holds, and the checkpoint that it makes.
    everyone: list[bytes] = field(default_factory=list)
    joined: Joined | None = None


@dataclass(frozen=True)
class Proposal:
    """What a rank sends instead of a plan: what it holds (None: as before), and a checksum of each piece."""

    held: bytes | None
    sums: list[int]


class SavePlanner(DefaultSavePlanner):
    """DCP's planner, which also refuses entries that are not tensors and replicas that differ.

    DCP sends every rank's plan to the coordinator and every final plan back, as an object for each piece, and looks for overlaps in
    quadratic time; here ranks send what they hold in a few bytes (joining.py), and hear which pieces to leave to others.

    compare  compare checksums of identical rectangles; off if only one rank saves
    """

    def __init__(self, cache: PlanCache, compare: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.cache, self.compare = cache, compare
        self.items: list[WriteItem] = []

    def set_up_planner(self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False) -> None:
        # Checked here, where DCP reports a failure to all ranks; earlier, the others would wait for this one.
        super().set_up_planner(views(state_dict), storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        self.items = [item for name, view in self.state_dict.items() for item in view.__create_write_items__(name, None)]
        held = [_held(item) for item in self.items]
        same = held == self.cache.held
        self.cache.held = held
        sums = [checksum(self.lookup_object(item.index)) for item in self.items] if self.compare else []
        return SavePlan([], planner_data=Proposal(None if same else packed(held), sums))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """What each rank leaves out, or None if it writes what it wrote last time. The metadata is `self.cache.joined`: DCP would send its
        own to all ranks.
        """
        proposals: list[Proposal] = [p.planner_data for p in all_plans]
        cache = self.cache
        same = cache.joined is not None and all(p.held is None for p in proposals)
        if not same:
            cache.joined = None
            cache.everyone = [cache.everyone[rank] if p.held is None else p.held for rank, p in enumerate(proposals)]
            cache.joined = join(cache.everyone)
        assert cache.joined is not None
        if self.compare and (found := cache.joined.unlike([p.sums for p in proposals])) is not None:
            name, first, other = found
            raise ReplicasDiffer(
                f"{name} should be the same on ranks {first} and {other}, but it differs: the run has diverged there, go back to an "
                "earlier checkpoint"
            )
        return [SavePlan([], planner_data=None if same else left_out) for left_out in cache.joined.left_out], Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        if new_plan.planner_data is None:
            assert self.cache.final is not None
            items = self.cache.final.items
        else:
            left_out = set(new_plan.planner_data.tolist())
            items = [item for number, item in enumerate(self.items) if number not in left_out]
        self.cache.final = SavePlan(items, storage_data=new_plan.storage_data)
        return super().finish_plan(self.cache.final)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].piece.local.detach()  # type: ignore[no-any-return]

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """All that the ranks hold together; on the coordinator, after the global plan."""
        assert self.cache.joined is not None
        return self.cache.joined.tensors


def _held(item: WriteItem) -> Held:
    data = item.tensor_data
    assert data is not None
    return Held(item.index.fqn, DTYPE_NAMES[data.properties.dtype], tuple(data.size), tuple(data.chunk.offsets), tuple(data.chunk.sizes))


class LoadPlanner(DefaultLoadPlanner):
    """DCP's planner, which accepts only exact matches: names, shapes, dtypes, and every local element read.

    `overlapping` gives the stored chunks of a tensor that share an element with the rectangle (offset, sizes).
    """

    def __init__(self, where: str, overlapping: Callable[[str, tuple[int, ...], tuple[int, ...]], list[ChunkStorageMetadata]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.where, self.overlapping = where, overlapping

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata
        missing = sorted(n for n in self.state_dict if n not in stored)
        for name, view in self.state_dict.items():
            meta = stored.get(name)
            if isinstance(meta, TensorMeta) and meta.properties.dtype == torch.float8_e4m3fn != view.piece.local.dtype:
                raise UsageError(
                    f"{self.where} holds {name} in FP8, for inference: start from a checkpoint of the run that it was exported from, whose "
                    "weights have full precision"
                )
        if missing:
            if all(n.startswith("optim.") for n in missing) and not any(n.startswith("optim.") for n in stored):
                raise UsageError(
                    f"{self.where} holds weights but no optimizer state, so no run can resume from it: start one with "
                    "checkpoint.init_from, or make it again with its state (megascale grow has --optimizer transform)"
                )
            raise UsageError(f"{self.where} lacks {some(missing)}: it was saved by another model or optimizer")
        for name, view in self.state_dict.items():
            have, local = stored[name], view.piece
            assert isinstance(have, TensorMeta)
            if tuple(have.size) != local.shape:
                raise UsageError(
                    f"{name} has shape {list(have.size)} in {self.where} but {list(local.shape)} here: set the model's sizes as they were"
                )
            if have.properties.dtype != local.local.dtype:
                key = "optim.moments" if name.startswith("optim.") else "precision"
                raise UsageError(f"{name} is {have.properties.dtype} in {self.where} but {local.local.dtype} here: set {key} as it was")
        plan = LoadPlan([item for name, view in self.state_dict.items() for item in self._items(name, view)])
        read: dict[str, int] = {}
        for item in plan.items:
            read[item.dest_index.fqn] = read.get(item.dest_index.fqn, 0) + math.prod(item.lengths)
        for name, view in self.state_dict.items():
            if read.get(name, 0) != view.piece.local.numel():
                raise UsageError(
                    f"{self.where} covers {read.get(name, 0)} of this rank's {view.piece.local.numel()} elements of {name}: it is damaged"
                )
        return plan

    def _items(self, name: str, view: PieceView) -> list[ReadItem]:
        meta, local = self.metadata.state_dict_metadata[name], view.__create_chunk_list__()  # type: ignore[union-attr]
        chunks = self.overlapping(name, view.piece.offset, tuple(view.piece.local.shape)) if local else []
        return create_read_items_for_chunk_list(name, dataclasses.replace(meta, chunks=chunks), local)  # type: ignore[arg-type]

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].piece.local.detach()  # type: ignore[no-any-return]


def checksum(tensor: Tensor) -> int:
    """A checksum of a tensor's bytes at memory speed: the crc32 of exact sums of rows of 8-byte words.

    The sums run on the tensor's device. Changing any one element changes the result; so does swapping two rows.
    """
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    even = raw.numel() // 8 * 8
    words = raw[:even]
    if words.storage_offset() % 8:  # a view of 8-byte words must be aligned
        words = words.clone()
    words = words.view(torch.int64)
    rows = words.numel() // SUMMED
    sums = words[: rows * SUMMED].view(rows, SUMMED).sum(dim=1)
    rest = torch.cat([sums.view(torch.uint8), words[rows * SUMMED :].view(torch.uint8), raw[even:]])
    return zlib.crc32(rest.cpu().numpy().tobytes())


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
