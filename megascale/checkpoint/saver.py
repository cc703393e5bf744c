"""Saving while training goes on: the step waits for a copy of the state only, a thread does the rest."""

from __future__ import annotations

import shutil
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megascale.checkpoint.loader import first_cause, steps_in
from megascale.checkpoint.planning import SavePlanner, views
from megascale.checkpoint.storage import ShardWriter, remove
from megascale.comm.piece import Piece


@dataclass(frozen=True)
class Event:
    """A save that ended: kind "saved" or "failed" (then `message` says why); the same on every rank."""

    kind: str
    step: int
    seconds: float
    message: str = ""


class Checkpointer:
    """Saves into `root` and keeps the last `keep_last` checkpoints and every one whose step `keep_every` divides."""

    def __init__(self, root: Path, *, keep_last: int, keep_every: int | None, asynchronous: bool) -> None:
        self.root, self.keep_last, self.keep_every, self.asynchronous = root, keep_last, keep_every, asynchronous
        # A group of its own: messages of the saving thread must not mix with those of training.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._events: list[Event] = []

    def save(self, step: int, state: dict[str, Piece], trainer: dict[str, Any]) -> None:
        """Starts a checkpoint of `state`; waits for the one before. Failures come back as events, never as exceptions."""
        self._join()
        if not self.asynchronous:
            self._write(step, state, trainer)
            return
        copy = self._copy(state)
        self._thread = threading.Thread(target=self._write, args=(step, copy, trainer), name="checkpoint")
        self._thread.start()

    def poll(self) -> list[Event]:
        """Events since the last call; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self._join()
        if self._thread is not None:
            return []
        events, self._events = self._events, []
        return events

    def finish(self) -> list[Event]:
        """Waits for a save under way and returns the remaining events."""
        self._join()
        return self.poll()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy(self, state: dict[str, Piece]) -> dict[str, Piece]:
        """The state in memory of our own, used again for every save: fresh memory is ten times slower to fill."""
        result = {}
        for name, piece in state.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != piece.local.shape or buffer.dtype != piece.local.dtype:
                pinned = piece.local.device.type == "cuda"
                buffer = self._buffers[name] = torch.empty(piece.local.shape, dtype=piece.local.dtype, pin_memory=pinned)
            buffer.copy_(piece.local, non_blocking=True)
            result[name] = Piece(piece.shape, piece.offset, buffer)
        if any(p.local.device.type == "cuda" for p in state.values()):
            torch.cuda.synchronize()
        return result

    def _write(self, step: int, state: dict[str, Piece], trainer: dict[str, Any]) -> None:
        start = time.perf_counter()
        coordinator = self.group is None or dist.get_rank() == 0
        writer = ShardWriter(self.root, step, trainer)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
                dcp.save(
                    views(state),
                    storage_writer=writer,
                    planner=SavePlanner(),
                    process_group=self.group,
                    no_dist=self.group is None,
                )
            if coordinator:
                self._retire(step)
            self._events.append(Event("saved", step, time.perf_counter() - start))
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            cause = first_cause(error) if isinstance(error, CheckpointException) else error
            if coordinator:
                shutil.rmtree(writer.temporary, ignore_errors=True)
            self._events.append(Event("failed", step, time.perf_counter() - start, f"{type(cause).__name__}: {cause}"))

    def _retire(self, saved: int) -> None:
        """Deletes what is no longer to be kept; never the one just saved, which `latest` names, whatever its number."""
        for folder in steps_in(self.root)[: -self.keep_last]:
            step = int(folder.name.removeprefix("step-"))
            if step != saved and (self.keep_every is None or step % self.keep_every):
                remove(folder)
