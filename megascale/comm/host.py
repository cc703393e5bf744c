"""Numbers between the host and a device, without either waiting for the other.

torch copies between ordinary memory and a device while the host stands still, and the copy stands behind all that is queued. So numbers go
to the device from pinned memory, and come back into pinned memory with an event behind them that is waited for when they are read, a step
later. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """A list of the host as a tensor there."""
    host = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        host = host.pin_memory()  # torch keeps the memory until the copy is done
    return host.to(device, non_blocking=True)


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """`to_device` of what never changes: copied once a process. Nobody may write into it."""
    return to_device(values, device, dtype)


def event_on(device: torch.device) -> Any:
    """Behind all that the device has been given on its present stream."""
    event = torch.get_device_module(device).Event()
    event.record()
    return event


class HostCopy:
    """A tensor on its way to the host, from what the device has been given so far."""

    def __init__(self, x: Tensor) -> None:
        self._host, self._event = x, None
        if x.device.type != "cpu":
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
            self._host.copy_(x, non_blocking=True)
            self._event = event_on(x.device)

    def read(self) -> Tensor:
        """The values, once the device has come so far."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host
