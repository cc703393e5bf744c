"""Watches every operation of a piece of a program: bytes alive, kernels, FLOPs, model time, tensors on the wrong device.

Real tensors pass through it as fake ones do, so the same meter measures a real run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megascale.trace.lines import place_here
from megascale.trace.memory import Memory
from megascale.trace.operations import Work, kind_of, name_of, work_of

# Operations that take tensors of two devices on purpose.
CROSSING = {"_to_copy", "copy_", "_pin_memory", "to"}
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
OPENED: dict[Any, Callable[..., Any]] = {}  # custom operators, each with the function that it runs, which is watched, too


class Kernel(NamedTuple):
    """An operation on the device in model time."""

    name: str
    line: str
    stream: int
    start: float
    seconds: float


@dataclass
class Counts:
    """Since the last `clear`: kernels by operation, views, FLOPs by operation, tensors of a wrong device by (operation, line)."""

    kernels: Counter[str] = field(default_factory=Counter)
    views: int = 0
    flops: Counter[str] = field(default_factory=Counter)
    wrong: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)


class Meter(TorchDispatchMode):
    """`device_type`: what is measured; other devices' bytes are followed, too. `timed`: told of each kernel's work, returns its stream and
    start; `viewed`: told of each operation without a kernel. `lines`: whether to look for the line of each operation.
    """

    def __init__(
        self,
        device_type: str,
        memory: Memory,
        timed: Callable[[Work], tuple[int, float, float]] | None = None,
        viewed: Callable[[], None] = lambda: None,
        lines: bool = True,
    ) -> None:
        super().__init__()
        self.device_type, self.memory, self.timed, self.viewed, self.lines = device_type, memory, timed, viewed, lines
        self.kind = "optimizer"  # of what is made from here on, outside backward
        self.counts = Counts()
        self.kernels: list[Kernel] = []
        self._forward: dict[int, str] = {}  # by number of an autograd node: the line that made it

    def clear(self) -> None:
        self.counts, self.kernels = Counts(), []

    def own(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Follows tensors that were made before."""
        for x in tensors:
            self.memory.add(x.untyped_storage(), x.device.type, kind, "", "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = kind_of(func)
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func in READS and isinstance(args[0], FakeTensor):
            return _read(func, args[0])
        if func in OPENED:
            with self:
                return OPENED[func](*args, **kwargs)
        given = _tensors((args, kwargs))
        out = func(*args, **kwargs)
        made = _tensors(out)
        if kind == "view":
            if self.timed is not None and any(x.device.type == self.device_type for x in made):
                self.counts.views += 1
                self.viewed()
            return out
        fresh = [x for x in made if x.untyped_storage()._cdata not in self.memory.live]
        on_device = any(x.device.type == self.device_type for x in (*given, *made))
        if not fresh and not on_device:
            return out
        line, kind_here = self._place() if self.lines or fresh else ("", "")
        for x in fresh:
            self.memory.add(x.untyped_storage(), x.device.type, kind_here, name_of(func), line)
        if on_device and kind == "kernel":
            self._launched(func, args, kwargs, given, made, out, line)
        return out

    def _launched(self, func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor], made: list[Tensor], out: Any, line: str) -> None:
        name = name_of(func)
        if name not in CROSSING and any(x.device.type != self.device_type and x.dim() > 0 for x in given):
            self.counts.wrong[name, line] += 1
        work = work_of(func, args, kwargs, given, made, out)
        self.counts.kernels[name] += work.kernels
        if work.flops:
            self.counts.flops[name] += work.flops  # type: ignore[assignment]
        if self.timed is not None:
            stream, start, seconds = self.timed(work)
            self.counts.seconds[name] += seconds  # type: ignore[assignment]
            self.kernels.append(Kernel(name, line, stream, start, seconds))

    def _place(self) -> tuple[str, str]:
        """(line, kind of memory) of the current operation. In backward it is the line that made the operation's node in forward."""
        line, kind = place_here() if self.lines else ("", "")
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        if node is None or torch.is_grad_enabled():  # recomputation enables gradients in backward
            self._forward[torch._C._autograd._get_sequence_nr() - 1] = line  # type: ignore[attr-defined]
            inside = torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]
            return line, kind or ("activations" if inside else self.kind)
        number = node._sequence_nr() if hasattr(node, "_sequence_nr") else -1
        made = self._forward.get(number)
        in_trainer = line.startswith(("megascale/schedule", "torch/"))
        return (f"{made} (backward)" if made and in_trainer else line), kind or "temporaries"


def _read(func: Any, x: Tensor) -> Any:
    """A value that the host reads; 1 for one that a fake does not have."""
    try:
        return func(x)
    except DataDependentOutputException:
        # An integer may be a number of rows, of which there may be none.
        return 1.0 if x.is_floating_point() else x.dtype is torch.bool or 1


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [x for x in tree_iter(tree) if isinstance(x, Tensor)]
