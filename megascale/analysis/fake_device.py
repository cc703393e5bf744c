"""A device that computes nothing, for machines without a GPU: torch's private backend with fake tensors, forward and backward.

To torch it is an accelerator like any other: FSDP2 creates streams on it, pipelines send from it, autograd guards it. Its tensors have a
shape, a dtype and a device, but no memory; those of the host are real. A `FakeDevice` changes torch for good, so create it in a process of
its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

NAME = "fakegpu"


class FakeEvent:
    """`number`: its number among all recorded events, which orders it among what was queued on the device."""

    recorded = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.number = 0

    def record(self, stream: Any = None) -> FakeEvent:
        FakeEvent.recorded += 1
        self.number = FakeEvent.recorded
        return self

    def wait(self, stream: Any = None) -> None:
        """A stream waits for it, not the host."""

    def synchronize(self) -> None:
        _waits(self.number)

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1.0


class FakeStream:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.device, self.device_index, self.stream_id = torch.device(NAME, 0), 0, 0

    def wait_event(self, event: FakeEvent) -> None:
        """This stream waits, not the host."""

    def wait_stream(self, other: FakeStream) -> None:
        """This stream waits, not the host."""

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        return (event or FakeEvent()).record()

    def synchronize(self) -> None:
        _waits(None)

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing runs, so nothing is switched."""


class FakeBackend:
    """For this device what `torch.cuda` is for CUDA. `waits`: the event's number for each wait of the host; None for everything queued."""

    Stream, Event = FakeStream, FakeEvent

    def __init__(self) -> None:
        self.waits: list[int | None] = []

    def stream(self, stream: FakeStream | None) -> FakeStream:
        return stream or FakeStream()

    def current_stream(self, device: Any = None) -> FakeStream:
        return FakeStream()

    def synchronize(self, device: Any = None) -> None:
        _waits(None)

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def set_device(self, device: Any) -> None:
        """There is only one."""

    def manual_seed_all(self, seed: int) -> None:
        """Nothing is drawn."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """Nothing is drawn."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Every recomputation asks for it."""
        return [torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False


BACKEND = FakeBackend()


def _waits(number: int | None) -> None:
    BACKEND.waits.append(number)


class _Guard(torch._C._acc.DeviceGuard):  # type: ignore[misc]
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


class _Hooks(torch._C._acc.PrivateUse1Hooks):  # type: ignore[misc]
    def is_available(self) -> bool:
        return True

    def has_primary_context(self, index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class FakeDevice:
    """Registers `device` with torch. Whatever is created there is a fake of one mode, whether that mode is active or not."""

    def __init__(self) -> None:
        backend_registration._setup_privateuseone_for_python_backend(NAME, BACKEND, _Hooks(), _Guard())
        self.device = torch.device(NAME, 0)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.library = torch.library.Library("aten", "IMPL")  # its registrations live as long as it does
        for name in ("empty.memory_format", "empty_strided"):
            self.library.impl(name, partial(self._make, getattr(torch.ops.aten, name.split(".")[0])), "PrivateUse1")
        torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign, assignment]  # no memory, no owner

    def _make(self, operation: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.mode:
            return operation(*args, **{**kwargs, "pin_memory": False})  # type: ignore[no-any-return]
