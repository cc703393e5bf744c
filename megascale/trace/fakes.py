"""What a process changes in torch and in the program to run on tensors without values. For good: it must be a process of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megascale.parallel import apply, expert, ring
from megascale.trace.meter import OPENED


def open_operators() -> None:
    """Meters look inside the ring's operators, which exchange and allocate."""
    for operator in (ring._attention, ring._attention_backward):
        body = getattr(operator, "_init_fn", None)  # private, and without it the operator is one kernel
        if body is not None:
            OPENED[operator._opoverload] = body


def without_values(mode: FakeTensorMode) -> None:
    """Weights get fake memory, every rank says what this one says, experts get equal loads, and FSDP2 does what it would with values."""
    allocate = apply.allocate

    def allocate_fake(*args: Any) -> None:
        with mode:
            allocate(*args)

    def gather_object(found: list[Any], own: Any, group: Any = None) -> None:
        found[:] = [own] * len(found)

    for module, name, function in (
        (apply, "allocate", allocate_fake),
        (dist, "all_gather_object", gather_object),
        (expert, "rows_exchanged", equal_rows),
    ):
        setattr(module, name, function)
    pad_once()
    lazy_chunks()


def equal_rows(there: Tensor, here: Tensor, rows: int) -> tuple[list[int], list[int]]:
    """As many rows to each rank as come from it. The host waits for the numbers all the same."""
    torch.stack((there.sum(1), here.sum(1))).sum().item()
    ranks = there.shape[0]
    each = [rows * (i + 1) // ranks - rows * i // ranks for i in range(ranks)]
    return each, [max(each)] * ranks if rows % ranks else each


def pad_once() -> None:
    """FSDP2 pads uneven shards twice, the second time only if the memory changed. It asks for addresses, which fakes do not have."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    reset = getattr(FSDPParam, "reset_sharded_param", None)
    if reset is None:
        return

    def once(self: Any) -> None:
        local = getattr(self._module_info.module, self._module_info.param_name)._local_tensor
        padded = self._sharded_param_data
        if not (isinstance(padded, FakeTensor) and padded.untyped_storage()._cdata == local.untyped_storage()._cdata):
            reset(self)

    FSDPParam.reset_sharded_param = once  # type: ignore[method-assign]


def lazy_chunks() -> None:
    """FSDP2 cuts a weight into as many chunks as there are ranks and keeps one or two: with thousands of ranks that is most of the work."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    if hasattr(_fsdp_param, "_chunk_with_empty"):
        _fsdp_param._chunk_with_empty = Chunks  # type: ignore[assignment]


class Chunks:
    """The chunks of a tensor along a dimension, empty ones at the end, cut when asked for."""

    def __init__(self, x: Tensor, count: int, dim: int) -> None:
        self.x, self.count, self.dim = x, count, dim

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Tensor:
        size = self.x.size(self.dim)
        step = -(-size // self.count)
        first, last = min(i * step, size), min((i + 1) * step, size)
        return self.x.narrow(self.dim, first, last - first) if last > first else self.x.new_empty(0)
