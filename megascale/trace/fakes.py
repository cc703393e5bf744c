"""What a process changes in torch and in the program to run on tensors without values. For good: it must be a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from megascale import handles
from megascale.comm import exchange
from megascale.model.ops import attention_sink, delta_rule
from megascale.optim import owners
from megascale.parallel import apply, delta, ring
from megascale.trace.meter import OPENED


def open_operators() -> None:
    """Meters look inside the operators that exchange and allocate."""
    rows = (exchange.exchange_counts, exchange.on_host, exchange.first_rows, exchange.send_rows, exchange.move_rows)
    rings = (ring._attention, ring._attention_backward, delta._rule, delta._rule_backward)
    sinks = (attention_sink._attention, attention_sink._attention_backward)
    scans = (delta_rule._rule, delta_rule._rule_backward)
    for operator in (*rings, *sinks, *scans, *rows):
        body = getattr(operator, "_init_fn", None)  # private, and without it the operator is one kernel
        if body is not None:
            OPENED[operator._opoverload] = body


def without_values(mode: FakeTensorMode) -> None:
    """Weights get fake memory, every rank says what this one says, experts get equal loads, and FSDP2 does what it would with values."""
    allocate = apply.allocate

    def allocate_fake(*args: Any) -> None:
        with mode:
            allocate(*args)

    if exchange.on_host._opoverload in OPENED:
        OPENED[exchange.on_host._opoverload] = told_host  # fakes have no pinned memory

    flying: dict[int, Any] = {}  # by the memory's object: torch itself goes by the address, which fakes do not have

    def start(x: Tensor, work: Any) -> None:
        flying[x.untyped_storage()._cdata] = work

    def landed(x: Tensor) -> Tensor:
        work = flying.pop(x.untyped_storage()._cdata, None)
        if work is not None:
            work.wait()
        return x

    def gather_object(found: list[Any], own: Any, group: Any = None) -> None:
        found[:] = [own] * len(found)

    for module, name, function in (
        (apply, "allocate", allocate_fake),
        (dist, "all_gather_object", gather_object),
        (exchange, "rows_exchanged", equal_rows),
        (exchange, "held", held_here),
        (handles, "held", held_here),
        (exchange, "in_flight", start),
        (exchange, "wait", landed),
        (owners, "wait", landed),
    ):
        setattr(module, name, function)
    pad_once()
    lazy_chunks()


def told_host(x: Tensor) -> Tensor:
    """A copy on the host, for which it waits here already."""
    return x.clone() if x.device.type == "cpu" else x.to("cpu")


def held_here(handle: Tensor, held: Callable[[Tensor], Any] = handles.held) -> Any:
    """The object of a handle, which is a number on the host: it has a value, and no meter needs to see it read."""
    with _disable_current_modes():
        return held(handle)


def equal_rows(splits: Tensor, rows: int) -> list[list[int]]:
    """As many rows to each rank as come from it. The host waits for the numbers all the same."""
    splits.sum().item()
    ranks = splits.shape[1]
    each = [rows * (i + 1) // ranks - rows * i // ranks for i in range(ranks)]
    return [each, [max(each)] * ranks if rows % ranks else each]


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
