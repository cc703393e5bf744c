"""Saves while training continues: the step only waits for a copy of the state, a thread does the rest."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.checkpoint.folders import LATEST, remove, step_name, steps_in
from megascale.checkpoint.room import after_failure
from megascale.comm.piece import Piece
from megascale.errors import MegascaleError, UsageError
from megascale.files import discard
from megascale.launch.exits import as_exit

if TYPE_CHECKING:  # DCP's import would delay the first step
    from torch.distributed.checkpoint.api import CheckpointException

    from megascale.checkpoint.index import TensorEntry
    from megascale.checkpoint.planning import PlanCache, SavePlanner
    from megascale.checkpoint.storage import ShardWriter

# Ranks wait for the slowest one's disk; a rank that dies is noticed at once, since its connection closes.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Event:
    """The end of a save: kind "saved", "failed" or "diverged" (`message` then gives the reason: a disk error, or that replicas differ,
    after which further steps are useless). Kind, step and message are the same on every rank.

    `code`: exit code if the run cannot continue without the failed save: 3, for memory 4, for a lost peer 5.
    Only the first rank also gets the end of an export: "exported" (`message` says where to) or "export_failed".
    """

    kind: str
    step: int
    seconds: float
    message: str = ""
    code: int = 3


def write_checkpoint(
    root: str | Path,
    step: int,
    state: dict[str, Piece],
    trainer: dict[str, Any],
    group: dist.ProcessGroup | None = None,
    *,
    compare_replicas: bool = True,
    cache: PlanCache | None = None,
    guard: Callable[[], None] | None = None,
) -> Path:
    """Writes `root`/step-N and lets `latest` name it; returns the folder. For tools and for `Checkpointer`.

    group             the gloo ranks that hold the state together (None: all); all must call
    compare_replicas  refuse pieces that several ranks hold and that differ; costs one pass over the state at memory speed
    cache             the plan of the last call; pass a new one after a failure
    guard             called on the first rank before anything is written: raises if the run no longer owns the folder

    Raises, on all ranks alike: UsageError for a state that cannot be saved, OSError for a disk error. Then nothing is left of the new
    checkpoint and older ones remain.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    from megascale.checkpoint.planning import PlanCache, SavePlanner
    from megascale.checkpoint.storage import ShardWriter

    root = Path(root)
    size = dist.get_world_size(group) if dist.is_initialized() else 1
    coordinator = size == 1 or dist.get_rank(group) == 0
    planner = SavePlanner(cache if cache is not None else PlanCache(), compare_replicas and size > 1)

    def prepare() -> dict[str, TensorEntry]:
        if guard is not None:
            guard()
        return planner.tensors

    writer = ShardWriter(root, step, trainer, prepare, after_failure)
    try:
        if size == 1:
            _write_alone(state, writer, planner)
        else:
            dcp_save(state, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:
        raise _first_cause(error) from None
    finally:
        if coordinator:  # renamed by now, unless something failed
            discard(writer.temporary)
    return root / step_name(step)


def _write_alone(state: dict[str, Piece], writer: ShardWriter, planner: SavePlanner) -> None:
    """DCP's steps without a group. Its own `no_dist` warns at each save, and silencing a warning in a thread affects other threads."""
    writer.reset()
    planner.set_up_planner(state, writer.storage_meta(), True)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    writer.finish(metadata, [writer.write_data(plan, planner).wait()])


def judged(error: Exception) -> tuple[int, str]:
    """The exit code if the run cannot continue without the failed save, and a message."""
    if isinstance(error, MegascaleError):
        return 3, str(error)
    known = as_exit(error)
    if known is not None and known.code == 5:
        return 5, "a peer is gone or silent"  # communication libraries give no useful message; the watchdog finds out which
    sentence = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        sentence = f"{error.filename}: {error.strerror}"
    return 4 if known is not None and known.code == 4 else 3, sentence


def _first_cause(error: CheckpointException) -> BaseException:
    """The failure of the lowest rank, preferring errors that a user can fix."""
    causes = [failure[0] for _, failure in sorted(error.failures.items())]
    return next((c for c in causes if isinstance(c, MegascaleError)), causes[0])


class NoCheckpoints:
    """Replaces the `Checkpointer` in runs that write nothing."""

    root: Path | None = None

    def save(self, step: int, state: dict[str, Piece], trainer: dict[str, Any]) -> None:
        pass

    def poll(self) -> list[Event]:
        return []

    def finish(self) -> list[Event]:
        return []


class Checkpointer:
    """Saves into `root`, keeping the last `keep_last` checkpoints and every one whose step `keep_every` divides.

    group         the ranks that hold the state together; None: all
    asynchronous  `save` returns after copying the state into its own memory, and a thread writes; if False, after writing
    export        called on the first rank with every saved folder after older ones were deleted: writes it in another format and returns
                  where
    guard         as in `write_checkpoint`

    A failure (a full disk, replicas that differ) is an event on all ranks, never an exception, and leaves the older checkpoints alone.
    """

    def __init__(
        self,
        root: str | Path,
        group: dist.ProcessGroup | None = None,
        *,
        keep_last: int,
        keep_every: int | None,
        asynchronous: bool,
        compare_replicas: bool = True,
        export: Callable[[Path], Path] | None = None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        self.export, self.guard = export, guard
        self.root, self.keep_last, self.keep_every = Path(root), keep_last, keep_every
        self.asynchronous, self.compare_replicas = asynchronous, compare_replicas
        self.group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            # A group of its own: messages of the saving thread must not mix with those of training.
            ranks = None if group is None else dist.get_process_group_ranks(group)
            self.group = dist.new_group(ranks, timeout=PATIENCE, backend="gloo", use_local_synchronization=group is not None)
        self._cache: PlanCache | None = None
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._events: list[Event] = []

    def save(self, step: int, state: dict[str, Piece], trainer: dict[str, Any]) -> None:
        """Starts a checkpoint of `state` and `trainer` (plain data); waits for the previous one."""
        from megascale.checkpoint.planning import PlanCache  # here, so that the thread does not import during training

        self._join()
        self._cache = self._cache or PlanCache()
        trainer = copy.deepcopy(trainer)
        if not self.asynchronous:
            self._write(step, state, trainer)
            return
        self._thread = threading.Thread(target=self._write, args=(step, self._copy(state), trainer), name="checkpoint")
        self._thread.start()

    def poll(self) -> list[Event]:
        """The events since the last call; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self._join()
        if self._thread is not None:
            return []
        events, self._events = self._events, []
        return events

    def finish(self) -> list[Event]:
        """Waits for a save in progress and returns the remaining events."""
        self._join()
        return self.poll()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @torch.no_grad()
    def _copy(self, state: dict[str, Piece]) -> dict[str, Piece]:
        """Copies the state into buffers that every save reuses: fresh memory is ten times slower to fill."""
        pieces = {n: p for n, p in state.items() if isinstance(p, Piece)}  # the rest is refused where all ranks see the error
        buffers = {}
        for name, piece in pieces.items():
            local, buffer = piece.local, self._buffers.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            buffers[name] = buffer
        self._buffers = buffers
        on_device = any(p.local.is_cuda for p in pieces.values())
        if pieces:
            # One call for all: thousands of small copies are bound by Python.
            torch._foreach_copy_(list(buffers.values()), [p.local for p in pieces.values()], non_blocking=on_device)
        if on_device:
            torch.cuda.synchronize()
        return {n: Piece(p.shape, p.offset, buffers[n]) if n in buffers else p for n, p in state.items()}

    def _write(self, step: int, state: dict[str, Piece], trainer: dict[str, Any]) -> None:
        from megascale.checkpoint.planning import ReplicasDiffer

        start = time.perf_counter()
        try:
            write_checkpoint(
                self.root, step, state, trainer, self.group, compare_replicas=self.compare_replicas, cache=self._cache, guard=self.guard
            )
        except Exception as error:
            self._cache = None  # on all ranks, since all must agree on what is cached
            code, message = judged(error)
            kind = "diverged" if isinstance(error, ReplicasDiffer) else "failed"
            self._events.append(Event(kind, step, time.perf_counter() - start, message, code))
            return
        first = self.group is None or dist.get_rank(self.group) == 0
        if first:
            self._retire()
        self._events.append(Event("saved", step, time.perf_counter() - start))
        if first and self.export is not None:
            self._export(self.export, step)

    def _export(self, export: Callable[[Path], Path], step: int) -> None:
        start = time.perf_counter()
        try:
            where = export(self.root / step_name(step))
        except (MegascaleError, OSError) as error:
            self._events.append(Event("export_failed", step, time.perf_counter() - start, str(error)))
            return
        self._events.append(Event("exported", step, time.perf_counter() - start, str(where)))

    def _retire(self) -> None:
        """Deletes checkpoints that need not be kept. Failed deletions are tried again after the next save."""
        try:
            steps = steps_in(self.root)
            recent = {path for _, path in steps[max(0, len(steps) - self.keep_last) :]}
            recent.add(self.root / (self.root / LATEST).read_text(encoding="utf-8").strip())
            for step, path in steps:
                if path not in recent and not (self.keep_every and step % self.keep_every == 0):
                    remove(path)
        except (OSError, UsageError):
            return
