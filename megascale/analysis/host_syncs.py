"""Where the host waits for the device: every operation in a piece of a program that makes it wait, and the line of our code that called it.

For tensors of `fake_device.py`, which have no values: whatever the host reads is answered with ones. These count:
- a value or a whole tensor that the host reads (`item`, `bool`, `float`, `tolist`, `.cpu()`, printing), unless copied without blocking
- a tensor that the host sends from pageable memory (`torch.tensor(…, device=…)`, `.to(device)`, an index by a list): torch waits until the
  copy is done, after everything queued before it
- a shape that depends on values (`nonzero`, a mask as an index, `unique`, `repeat_interleave` without its length)
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.comm import exchange  # noqa: F401  it declares operators that read what they are given

aten = torch.ops.aten
ROOT = Path(__file__).parents[1]
WATCHERS = (__file__, f"{ROOT}/trace/")
BY_VALUE = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.equal.default,
}
SIZED = {torch.ops.megascale.send_rows.default, torch.ops.megascale.first_rows.default}  # by numbers on their way to the host
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor}


class HostSync(NamedTuple):
    """One kind of wait at one line: "file:line code"."""

    kind: str
    where: str


VALUE, TOLD, GIVEN, SHAPE = "a value is told", "a tensor is told", "a tensor is given", "a shape is told"


@contextmanager
def host_syncs(device_type: str, then: Callable[[], None] = lambda: None) -> Iterator[Counter[HostSync]]:
    """Yields a counter of what makes the host wait for a device of this type inside the block. `then` is called at each wait."""
    found: Counter[HostSync] = Counter()

    def wait(kind: str) -> None:
        found[HostSync(kind, line_of_ours())] += 1
        then()

    with _Constants(device_type, wait), _Operations(device_type, wait):
        yield found


class _Constants(TorchFunctionMode):
    """Tensors made from Python values: torch copies them without the dispatcher."""

    def __init__(self, device_type: str, wait: Callable[[str], None]) -> None:
        super().__init__()
        self.device_type, self.wait = device_type, wait

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device.type == self.device_type:
            args = (args[0], self._given_lists(args[1], args[0].device), *args[2:])
        device = kwargs.get("device")
        if func not in (torch.tensor, torch.as_tensor) or device is None or torch.device(device).type != self.device_type:
            return func(*args, **kwargs)
        self.wait(GIVEN)
        host = func(*args, **{**kwargs, "device": "cpu"})
        return torch.empty(host.shape, dtype=host.dtype, device=device)

    def _given_lists(self, index: Any, device: torch.device) -> Any:
        """An index with its lists replaced by tensors on the device."""
        parts = index if isinstance(index, tuple) else (index,)
        if not any(isinstance(part, list) for part in parts):
            return index
        self.wait(GIVEN)
        return tuple(torch.empty(len(p), dtype=torch.int64, device=device) if isinstance(p, list) else p for p in parts)


class _Operations(TorchDispatchMode):
    def __init__(self, device_type: str, wait: Callable[[str], None]) -> None:
        super().__init__()
        self.device_type, self.wait = device_type, wait

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = self._kind(func, args, kwargs)
        if kind:
            self.wait(kind)
        return self._answer(func, args, kwargs)

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation's result; ones if the host reads something."""
        if func is aten._local_scalar_dense.default and self._on_device(args[0]):
            return 1.0 if args[0].is_floating_point() else args[0].dtype is torch.bool or 1
        if func in SIZED and self._on_device(args[0]):
            return torch.empty_like(args[0])  # as many rows as if the load were even
        if func is aten._to_copy.default and self._crosses(args[0], kwargs.get("device")):
            make = torch.ones if self._on_device(args[0]) else torch.empty
            return make(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=kwargs["device"])
        if func is aten.copy_.default and self._crosses(args[1], args[0].device):
            return args[0] if self._on_device(args[0]) else args[0].fill_(1)
        return func(*args, **kwargs)

    def _kind(self, func: Any, args: Any, kwargs: Any) -> str:
        """The kind of wait; empty if there is none."""
        if func in SIZED:
            return VALUE if self._on_device(args[0]) else ""
        if func is aten._local_scalar_dense.default:
            return VALUE if self._on_device(args[0]) else ""
        if func is aten._to_copy.default and not kwargs.get("non_blocking"):
            return self._crossing(args[0], kwargs.get("device"))
        if func is aten.copy_.default and not (kwargs.get("non_blocking") or any(args[2:])):
            return self._crossing(args[1], args[0].device)
        if func in BY_VALUE or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
            return SHAPE if self._on_device(args[0]) else ""
        if func in INDEXING and self._on_device(args[0]):
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                return SHAPE
            return GIVEN if any(i.ndim and not self._on_device(i) for i in indices) else ""
        return ""

    def _on_device(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.device.type == self.device_type

    def _crosses(self, source: Tensor, to: torch.device | None) -> bool:
        return to is not None and self.device_type in (source.device.type, to.type) and source.device.type != to.type

    def _crossing(self, source: Tensor, to: torch.device | None) -> str:
        return "" if not self._crosses(source, to) else TOLD if self._on_device(source) else GIVEN


def line_of_ours() -> str:
    """The innermost line of this package on the stack, or of torch if there is none, as in a backward pass."""
    frames = [f for f in traceback.extract_stack() if not f.filename.startswith(WATCHERS)]
    # Modes are on the stack between an operation and its caller.
    ours = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and f.name not in ("__torch_dispatch__", "__torch_function__")]
    frame = (ours or frames)[-1]
    name = frame.filename.removeprefix(f"{ROOT.parent}/")
    return f"{name}:{frame.lineno} {frame.line}"
