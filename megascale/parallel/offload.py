"""Keeps block inputs in host memory between forward and backward.

With full recomputation only a block's input lives from its forward to its backward. It is copied to the host right after the block has
run, and back one block ahead of its use; on CUDA both overlap with computation. On a machine without a GPU the same code copies within
host memory: no gain, but every layout can be tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megascale.model.family import Family


@dataclass
class Parcel:
    """One tensor away from its device. `back` is its copy on the device once the transfer has begun; `copied` marks the end of the current
    copy on CUDA.
    """

    host: Tensor
    device: torch.device
    back: Tensor | None = None
    copied: torch.cuda.Event | None = None


@dataclass
class HostStash:
    """Tensors sent to the host and called back, mostly in reverse order: the one sent before is prefetched.

    Buffers are reused, since fresh pages cost more than the copy. `held`: bytes currently on the host; `most`: their maximum.
    """

    device: torch.device
    sent: list[Parcel] = field(default_factory=list)
    free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = field(default_factory=dict)
    held: int = 0
    most: int = 0

    def __post_init__(self) -> None:
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def send(self, x: Tensor) -> Parcel:
        buffers = self.free.setdefault((x.shape, x.dtype), [])
        host = buffers.pop() if buffers else torch.empty(x.shape, dtype=x.dtype, pin_memory=self.stream is not None)
        parcel = Parcel(host, x.device)
        with self._beside(parcel):
            host.copy_(x, non_blocking=True)
        if self.stream is not None:
            x.record_stream(self.stream)
        self.sent.append(parcel)
        self.held += host.nbytes
        self.most = max(self.most, self.held)
        return parcel

    def call_back(self, parcel: Parcel) -> Tensor:
        place = next(i for i in reversed(range(len(self.sent))) if self.sent[i] is parcel)
        self._fetch(parcel)
        if place > 0:
            self._fetch(self.sent[place - 1])
        del self.sent[place]
        back = parcel.back
        assert back is not None
        if parcel.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(parcel.copied)
            back.record_stream(torch.cuda.current_stream(self.device))
        self.held -= parcel.host.nbytes
        # The next tensor is written here on the same stream, after this one has been read.
        self.free[parcel.host.shape, parcel.host.dtype].append(parcel.host)
        return back

    def _fetch(self, parcel: Parcel) -> None:
        if parcel.back is None:
            with self._beside(parcel):
                parcel.back = torch.empty_like(parcel.host, device=parcel.device).copy_(parcel.host, non_blocking=True)

    @contextmanager
    def _beside(self, parcel: Parcel) -> Iterator[None]:
        """Runs a copy on the side stream, after what the current stream has queued."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
            parcel.copied = self.stream.record_event()


def offload_block_inputs(model: Family, device: torch.device) -> HostStash:
    """Installs a stash in every block; blocks recompute, so they keep only their inputs. Returns the stash, for its byte counts."""
    stash = HostStash(device)
    for _, block in model.units():
        block.forward = _stashing(block.forward, stash)  # type: ignore[method-assign]
    return stash


def _stashing(forward: Callable[..., Tensor], stash: HostStash) -> Callable[..., Tensor]:
    def stashed(x: Tensor, *args: Any) -> Tensor:
        # Not x itself: autograd keeps the hooks and everything that they refer to.
        stream = x.data_ptr(), x.shape

        def pack(saved: Tensor) -> Tensor | Parcel:
            # Only the stream: weights and rotary angles that a compiled block saves are needed elsewhere anyway.
            return stash.send(saved) if (saved.data_ptr(), saved.shape) == stream else saved

        def unpack(kept: Tensor | Parcel) -> Tensor:
            return stash.call_back(kept) if isinstance(kept, Parcel) else kept

        with saved_tensors_hooks(pack, unpack):
            return forward(x, *args)

    return stashed
