"""Copies of numbers between the host and a device for which neither waits.

With pageable memory the host waits for torch's copy, which runs after everything queued before it. So numbers go to the device from pinned
memory, and return into pinned memory followed by an event, which the host waits for when it reads them, one step later. On a CPU nothing is
copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """A list of numbers as a tensor on the device."""
    host = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        host = host.pin_memory()  # torch keeps the memory until the copy is done
    return host.to(device, non_blocking=True)


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """`to_device` for numbers that never change: copied once per process. Do not write into the result."""
    return to_device(values, device, dtype)


def event_on(device: torch.device) -> Any:
    """An event after everything queued so far on the device's current stream."""
    event = torch.get_device_module(device).Event()
    event.record()
    return event


class HostCopy:
    """A tensor on its way to the host, copied after everything queued on the device so far."""

    def __init__(self, x: Tensor) -> None:
        self._host, self._event = x, None
        if x.device.type != "cpu":
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
            self._host.copy_(x, non_blocking=True)
            self._event = event_on(x.device)

    def read(self) -> Tensor:
        """The values; waits until they are copied."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host
