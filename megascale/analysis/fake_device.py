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
    """`number`: its number among all recorded events, which orders it among what was queued on the device; `time`: when it is reached."""

    recorded = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.number, self.time = 0, 0.0

    def record(self, stream: FakeStream | None = None) -> FakeEvent:
        FakeEvent.recorded += 1
        self.number, self.time = FakeEvent.recorded, (stream or BACKEND.current).ready
        return self

    def wait(self, stream: FakeStream | None = None) -> None:
        """A stream waits for it, not the host."""
        (stream or BACKEND.current).wait_until(self.time)

    def synchronize(self) -> None:
        _waits(self.number, self.time)

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1.0


class FakeStream:
    """A queue of the device. `ready`: the model time at which all that is queued is done; it stays 0 unless somebody models time
    (megascale/trace). `waited`: seconds in which it had nothing to do but wait for others.
    """

    made = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device_index, self.stream_id = 0, FakeStream.made
        FakeStream.made += 1
        self.ready = self.waited = 0.0
        self._before: list[FakeStream] = []

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0)

    def wait_event(self, event: FakeEvent) -> None:
        """This stream waits, not the host."""
        self.wait_until(event.time)

    def wait_stream(self, other: FakeStream) -> None:
        """This stream waits, not the host."""
        self.wait_until(other.ready)

    def wait_until(self, time: float) -> None:
        begun = max(self.ready, BACKEND.host)
        if time > begun:
            self.waited += time - begun
        self.ready = max(self.ready, time)

    def run(self, seconds: float) -> float:
        """Queues work that takes so long, not before the host has come to it. Returns when it starts."""
        start = max(self.ready, BACKEND.host)
        self.ready = start + seconds
        return start

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        return (event or FakeEvent()).record(self)

    def synchronize(self) -> None:
        _waits(None, self.ready)

    def __enter__(self) -> FakeStream:
        self._before.append(BACKEND.current)
        BACKEND.current = self
        return self

    def __exit__(self, *_: object) -> None:
        BACKEND.current = self._before.pop()


class FakeBackend:
    """For this device what `torch.cuda` is for CUDA. `waits`: the event's number for each wait of the host; None for everything queued.
    `host`: the model time of the host, which queues work; `stalled`: seconds in which it waited for the device.
    """

    Stream, Event = FakeStream, FakeEvent

    def __init__(self) -> None:
        self.waits: list[int | None] = []
        self.host = self.stalled = 0.0
        self.default = self.current = FakeStream()

    def wait_until(self, time: float) -> None:
        """The host does nothing before this time."""
        self.stalled += max(0.0, time - self.host)
        self.host = max(self.host, time)

    def stream(self, stream: FakeStream | None) -> FakeStream:
        return stream or self.current

    def current_stream(self, device: Any = None) -> FakeStream:
        return self.current

    def synchronize(self, device: Any = None) -> None:
        _waits(None, self.current.ready)

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


def _waits(number: int | None, until: float) -> None:
    BACKEND.waits.append(number)
    BACKEND.wait_until(until)


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
