"""Watches over the ranks, so that a hung collective or a lost peer ends the job in time with a message that names rank, node and operation.

Every rank writes a heartbeat to the rendezvous TCPStore: a rising number, and what its main thread is doing. Rank 0 reads all heartbeats
and publishes a verdict when one stays silent or nothing moves. Every rank checks for a verdict, then saves the stacks of all its threads
and exits with code 5. The thread never touches tensors or process groups, so it also runs while the main thread hangs in either.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megascale.comm.mesh import Traffic
from megascale.errors import ExitCode
from megascale.files import write_atomic
from megascale.launch.environment import FLIGHT
from megascale.launch.exits import Exit, write_exit
from megascale.launch.ranks import RankInfo, node_name
from megascale.train.faults.gate import Gate, Leaving
from megascale.train.faults.lived import STILL, LivedClock
from megascale.train.faults.stop import StopFlag

HEARTBEAT = 1.0  # seconds between two heartbeats, at least
READ = 1000  # heartbeats that rank 0 reads in a second, at most: they take 1 to 2 % of its interpreter; more ranks send them less often
MISSED = 5  # heartbeats that a rank may be late before it is silent, whatever run.collective_timeout is
FILE_EVERY = 10.0  # seconds between two heartbeat files
LOOK = 2.5  # heartbeats to wait to see whether a peer still sends new ones
SILENCE = 120.0  # seconds without a heartbeat after which a rank is lost, unless run.collective_timeout is shorter
STARTING = "starting"  # no progress is expected before the end of the first step: kernels compile, files are read
SAVING, SAVING_PATIENCE = "saving", 12  # a slow disk is not a lost peer: patience in units of run.collective_timeout
GONE = "has left"
NO_STORE = "rank 0 is gone, or torchrun's agent on its node: the rendezvous TCPStore does not answer"


class Activity:
    """What the main thread is doing, written by it and read by the watchdog; the point to leave at and frozen time go the other way."""

    def __init__(self) -> None:
        self.step, self.phase = 0, STARTING
        self.traffic: Traffic | None = None
        self.stop = StopFlag()
        self.gate = Gate()
        self.clock: LivedClock | None = None  # read by the watchdog
        self.run_dir: Path | None = None  # None until the run has claimed it

    def at(self, step: int, phase: str) -> None:
        self.step, self.phase = step, phase

    def thawed(self) -> float:
        """Seconds for which this process was frozen since the last call."""
        return 0.0 if self.clock is None else self.clock.frozen()


@dataclass(frozen=True)
class Heartbeat:
    """One rank's state. `moved` counts collectives and micro-batches; `ending` is the reason why it left."""

    rank: int
    node: str
    count: int = 0
    step: int = 0
    phase: str = STARTING
    moved: int = 0
    last: str = ""
    ending: str = ""

    @property
    def place(self) -> str:
        doing = f"step {self.step}, {self.phase}" if self.phase != STARTING else STARTING
        return f"{doing}, last collective {self.last}" if self.last else doing

    @property
    def progress(self) -> tuple[int, str, int]:
        return self.step, self.phase, self.moved

    @staticmethod
    def read(text: bytes, last: Heartbeat) -> Heartbeat:
        """Parses a rank's heartbeat; returns `last` if it is invalid, since anybody who reaches the store can write to it."""
        try:
            heartbeat = Heartbeat(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return last
        same_kinds = all(type(mine) is type(its) for mine, its in zip(vars(last).values(), vars(heartbeat).values()))
        return heartbeat if same_kinds and heartbeat.rank == last.rank else last


@dataclass
class PeerView:
    """The last heartbeat of a rank, and when, on the observer's clock, it and its progress last changed."""

    heartbeat: Heartbeat
    heard: float
    moved: float

    def see(self, heartbeat: Heartbeat, now: float) -> None:
        if heartbeat.count != self.heartbeat.count:
            self.heard = now
        if heartbeat.progress != self.heartbeat.progress:
            self.moved = now
        self.heartbeat = heartbeat


def find_hang(views: Sequence[PeerView], now: float, silence: float, limit: float) -> str | None:
    """Why the job must end, naming rank, node, step and last collective; None while all is well.

    silence  seconds without a heartbeat after which a rank is lost
    limit    seconds without progress after which a step hangs
    """
    lost = [s for s in views if now - s.heard > silence and s.heartbeat.phase != GONE]
    if lost:
        return _names(lost, f"silent for {now - lost[0].heard:.0f} s")
    running = [s for s in views if s.heartbeat.phase != GONE]
    patience = {STARTING: math.inf, SAVING: SAVING_PATIENCE * limit}
    if any(now - s.moved <= limit for s in running) or not any(now - s.moved > patience.get(s.heartbeat.phase, limit) for s in running):
        return None
    # A rank that waits in a collective has started it; the missing one has started fewer, or is still in an earlier step.
    behind = min(running, key=lambda s: (s.heartbeat.step, s.heartbeat.moved))
    others = [s for s in running if s.heartbeat.progress != behind.heartbeat.progress]
    if not others:
        return (
            f"nothing has moved for {limit:.0f} s: all {len(running)} ranks are at the same place ({behind.heartbeat.place}), so look at "
            "the network between them, or raise run.collective_timeout if a micro-batch takes that long"
        )
    return (
        f"nothing has moved for {limit:.0f} s: rank {behind.heartbeat.rank} on {behind.heartbeat.node} is behind "
        f"({behind.heartbeat.place}), while rank {others[0].heartbeat.rank} on {others[0].heartbeat.node} waits "
        f"({others[0].heartbeat.place})"
    )


def find_lost_peer(before: Sequence[Heartbeat], after: Sequence[Heartbeat]) -> str | None:
    """The lost peers, from two readings some heartbeats apart: ranks that left with a reason of their own, else ranks without a new one."""
    first = [b for b in after if b.ending]
    if first:
        return f"rank {first[0].rank} on {first[0].node} left ({first[0].place}): {first[0].ending}"
    silent = [PeerView(b, 0.0, 0.0) for a, b in zip(before, after) if a.count == b.count and b.phase != GONE]
    return _names(silent, "gone") if silent else None


def words_of(text: bytes) -> str:
    """A verdict as one printable line, whoever wrote it."""
    return "".join(c if c.isprintable() else " " for c in text[:4000].decode(errors="replace"))


def _names(views: Sequence[PeerView], what: str) -> str:
    shown = "; ".join(f"rank {s.heartbeat.rank} on {s.heartbeat.node} is {what} ({s.heartbeat.place})" for s in views[:4])
    return shown + (f"; and {len(views) - 4} more" if len(views) > 4 else "")


def keep_flight(path: Path) -> None:
    """The last collectives that NCCL was given, where it recorded them (launch/environment.py); a torch without NCCL has no recorder."""
    with suppress(Exception):
        record: bytes = torch._C._distributed_c10d._dump_nccl_trace_json()  # type: ignore[attr-defined]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(record)


class Watchdog:
    """A thread next to the main one. `store` None: a single process, whose heartbeats go to the heartbeat file only."""

    def __init__(self, ranks: RankInfo, store: dist.Store | None, limit: float) -> None:
        self.ranks, self.limit, self.every = ranks, limit, max(HEARTBEAT, ranks.size / READ)
        self.silence = max(min(limit, SILENCE), MISSED * self.every)
        # A connection serves requests in order, and one of the main thread's may wait for a peer that never comes.
        self.store = None
        if store is not None:
            own: dist.Store = store.clone()  # type: ignore[attr-defined]  # torch does not declare it
            own.set_timeout(timedelta(seconds=min(self.silence, 30.0)))
            self.store = dist.PrefixStore("watch", own)
        self.activity = Activity()
        self._count, self._file_due = 0, 0.0
        self._ending, self._kept = "", False
        self._views: list[PeerView] = []
        self._closed = threading.Event()
        self._clock = self.activity.clock = LivedClock()
        self._known: dict[int, Heartbeat] = {}  # the last valid heartbeat of every rank
        self._leaving = None if self.store is None else Leaving(self.activity.gate, self.store, ranks.rank, ranks.size)
        self._answered = self._clock.now()
        for name, work in (("beats", self._watch), ("watch", self._check_store_answers)):
            threading.Thread(target=work, name=name, daemon=True).start()

    @property
    def run_dir(self) -> Path | None:
        return self.activity.run_dir

    def leaves(self, ending: Exit) -> None:
        """Announces that this rank exits: its silence is no longer an alarm, and peers know the reason."""
        self.activity.phase = GONE
        if ending.code not in (ExitCode.DONE, ExitCode.PEER_LOST, ExitCode.STOPPED):  # the last two are not this rank's fault
            self._ending = f"code {ending.code}, {ending.reason.splitlines()[0][:300]}"
        self._closed.set()
        with suppress(RuntimeError):  # the store's process may have exited before
            self._post()

    def explain(self, error: BaseException, reason: str) -> str:
        """After a communication error: which peer caused it, which takes some heartbeats to see. All ranks end with the same message."""
        if self.store is None:
            return reason
        self._keep_stacks("".join(traceback.format_exception(error)))
        try:
            before = self._heartbeats()
            time.sleep(LOOK * self.every)
            text = find_lost_peer(before, self._heartbeats())
            if text is None:
                return self._after_a_freeze(reason)
            text = self._agree(text)
            if self.ranks.rank == 0:
                time.sleep(LOOK * self.every)  # this process may host the store: the other ranks must read the verdict first
        except RuntimeError:
            text = self._no_store()
        return f"{text}; run the same command again"

    def _after_a_freeze(self, reason: str) -> str:
        """The explanation if all peers live but a connection ended, as it does after a freeze longer than a library's time-out."""
        if self._clock.last_frozen <= STILL:
            return reason
        frozen = f"this job was frozen for {self._clock.last_frozen:.0f} s (suspended, or its machine was)"
        return f"{frozen}, and communication did not outlive it ({reason})"

    def _watch(self) -> None:
        while not self._closed.is_set():
            pause = self.every
            try:
                self._post()
                self._write_file()
                verdict = self._verdict()
                asked = self.activity.stop.requested()
                if self._leaving is not None and self._leaving.look(asked):
                    pause = self.every / 4  # gates are closed meanwhile
            except RuntimeError:
                self._closed.wait(self.every)  # all ranks may be leaving, with rank 0 first
                verdict = self._no_store()
            except Exception:
                verdict = None  # garbage that strangers write into the store must not end this thread
            self._answered = self._clock.now()
            if verdict is not None and not self._closed.is_set():
                self._leave(verdict)
            self._closed.wait(pause)

    def _check_store_answers(self) -> None:
        """A frozen node never answers a request, and torch's store has no time-out for some of them."""
        while not self._closed.wait(HEARTBEAT):
            waited = self._clock.now() - self._answered
            if self.store is not None and waited > self.silence + LOOK * self.every:
                self._leave(self._no_store(f" for {waited:.0f} s"))

    def _verdict(self) -> str | None:
        """The verdict that rank 0 has published, or finds now. Other ranks also notice when rank 0 itself falls silent."""
        if self.store is None:
            return None
        if self.store.check(["verdict"]):
            return words_of(self.store.get("verdict"))
        seen = self._heartbeats() if self.ranks.rank == 0 else self._heartbeats(1)
        found = find_hang(self._look(seen), self._clock.now(), self.silence, self.limit if self.ranks.rank == 0 else math.inf)
        return None if found is None else self._agree(found)

    def _agree(self, verdict: str) -> str:
        """The verdict of the rank that was first, the same for all."""
        assert self.store is not None
        return words_of(self.store.compare_set("verdict", "", verdict)) or verdict

    def _look(self, heartbeats: Sequence[Heartbeat]) -> list[PeerView]:
        now = self._clock.now()
        if not self._views:
            self._views = [PeerView(b, now, now) for b in heartbeats]
        for view, heartbeat in zip(self._views, heartbeats):
            view.see(heartbeat, now)
        return self._views

    def _heartbeat(self) -> Heartbeat:
        traffic = self.activity.traffic
        moved, last = (0, "") if traffic is None else traffic.reached()
        return Heartbeat(self.ranks.rank, node_name(), self._count, self.activity.step, self.activity.phase, moved, last, self._ending)

    def _post(self) -> None:
        self._count += 1
        if self.store is not None:
            self.store.set(str(self.ranks.rank), json.dumps(asdict(self._heartbeat())))

    def _heartbeats(self, ranks: int | None = None) -> list[Heartbeat]:
        """The heartbeats of the first `ranks` ranks, by default of all. A rank that has not begun yet counts as 0."""
        assert self.store is not None
        keys = [str(r) for r in range(self.ranks.size if ranks is None else ranks)]
        if self.store.check(keys):
            texts = dict(enumerate(self.store.multi_get(keys)))
        else:
            texts = {int(k): self.store.get(k) for k in keys if self.store.check([k])}
        for rank, text in texts.items():
            self._known[rank] = Heartbeat.read(text, self._known.get(rank, Heartbeat(rank, "?")))
        return [self._known.get(int(k), Heartbeat(int(k), "?")) for k in keys]

    def _write_file(self) -> None:
        """Writes the run's heartbeat.json for outside monitors."""
        now = self._clock.now()
        if self.ranks.rank != 0 or self.run_dir is None or now < self._file_due:
            return
        self._file_due = now + FILE_EVERY
        heartbeat = self._heartbeat()
        quiet: dict[str, Any] = {}
        if self._views:
            worst = min(self._views, key=lambda s: s.heard)
            quiet = {"quietest_rank": worst.heartbeat.rank, "quiet_seconds": round(now - worst.heard, 1)}
        record = {"time": round(time.time(), 3), "step": heartbeat.step, "phase": heartbeat.phase, "ranks": self.ranks.size, **quiet}
        with suppress(OSError):  # a full disk is reported elsewhere
            write_atomic(self.run_dir / "heartbeat.json", json.dumps(record) + "\n")

    def _no_store(self, how_long: str = "") -> str:
        return f"{NO_STORE}{how_long}; rank {self.ranks.rank} was at {self._heartbeat().place}"

    def _keep_stacks(self, why: str) -> None:
        if self.run_dir is None or not self.run_dir.is_dir():
            return
        with suppress(OSError):
            (self.run_dir / "stacks").mkdir(exist_ok=True)
            path = self.run_dir / "stacks" / f"rank-{self.ranks.rank:05d}.txt"
            with open(path, "a" if self._kept else "w", encoding="utf-8") as file:
                self._kept = True
                file.write(f"{why}\nrank {self.ranks.rank} on {node_name()}: {self._heartbeat().place}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        keep_flight(self.run_dir / FLIGHT / f"rank-{self.ranks.rank:05d}.json")

    def _leave(self, verdict: str) -> None:
        """Ends this process from this thread, since the main thread may hang forever."""
        self._keep_stacks(verdict)
        stacks = "" if self.run_dir is None else f"; stacks of all ranks that live are in {self.run_dir / 'stacks'}"
        write_exit(self.run_dir, Exit(ExitCode.PEER_LOST, f"{verdict}; run the same command again"), self.ranks, self.activity.step)
        print(f"\nerror: {verdict}{stacks}; run the same command again", file=sys.stderr, flush=True)
        if self.ranks.rank == 0:
            time.sleep(LOOK * self.every)  # this process may host the store: the other ranks must read the verdict first
        os._exit(ExitCode.PEER_LOST)
