"""A whole job as events: steps, saves, failures, broken nodes, the queue, slow links. Imports no torch.

Chance is drawn before: `draw` makes the lists of failures and of slow spells from a seed, and `simulate` is a function of the job and of
these lists. So two jobs can be compared under the same failures, and a test can write them by hand.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile


@dataclass(frozen=True)
class Job:
    """What a job does and what it meets. Seconds, if not said otherwise.

    step             seconds of a step
    every            steps between saves; 0 never saves
    save             a save stops training for so long
    written          from then until the save can be loaded; a failure before falls back to the one before
    failure          mean time between failures of the whole job; infinite without
    restart          from a failure, once there are nodes, to the first step
    queue            wait for the scheduler before such a restart
    in_place         share of the failures that leave every node sound, so that its processes start again where they are
    in_place_restart the same as `restart` for these, which do not queue
    spares           nodes that stand by; None: there is always one
    repair           from a node's failure until it can be used again
    slow_every       mean time from the end of a slow spell to the next; infinite without
    slow             length of a spell
    slow_factor      a step takes so many times as long in it
    """

    step: float
    every: int
    save: float = 0.0
    written: float = 0.0
    failure: float = math.inf
    restart: float = 0.0
    queue: float = 0.0
    in_place: float = 0.0
    in_place_restart: float = 0.0
    spares: int | None = None
    repair: float = 0.0
    slow_every: float = math.inf
    slow: float = 0.0
    slow_factor: float = 1.0


@dataclass(frozen=True)
class Failure:
    """Something stops the job. `node`: a node is broken and must be replaced."""

    time: float
    node: bool = True


@dataclass(frozen=True)
class Chance:
    """What happens to a job: failures in order, and spells of slow links, (start, end), which do not overlap."""

    failures: Sequence[Failure] = ()
    slow: Sequence[tuple[float, float]] = ()


@dataclass
class Outcome:
    """Seconds of a job by what they went to, which sum to its length, and its events as (time, what happened).

    trained   steps that count in the end, each for the time it takes at full speed
    slowed    what slow links added to steps, lost ones included
    lost      steps that were done again or cut off by a failure or by the end
    saving    training stood still for a save
    restarting, waiting  after failures; waiting is for the queue and for a node
    """

    seconds: float
    trained: float = 0.0
    slowed: float = 0.0
    lost: float = 0.0
    saving: float = 0.0
    restarting: float = 0.0
    waiting: float = 0.0
    steps: int = 0
    failures: int = 0
    events: list[tuple[float, str]] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        return self.trained / self.seconds


def draw(job: Job, seconds: float, seed: int) -> Chance:
    """Failures and slow spells of so many seconds. Each has its own generator: changing one does not change the other."""
    times, kinds = random.Random(f"{seed} failures"), random.Random(f"{seed} kinds")
    failures, now = [], 0.0
    while math.isfinite(job.failure):
        now += times.expovariate(1 / job.failure)
        if now >= seconds:
            break
        failures.append(Failure(now, kinds.random() >= job.in_place))
    spells, slow, now = random.Random(f"{seed} slow"), [], 0.0
    while math.isfinite(job.slow_every) and job.slow > 0:
        now += spells.expovariate(1 / job.slow_every)
        if now >= seconds:
            break
        slow.append((now, now + job.slow))
        now += job.slow
    return Chance(failures, slow)


def simulate(job: Job, seconds: float, chance: Chance) -> Outcome:
    """Runs the job for so long. A failure hits the nodes that hold the job: while it waits for nodes there is nothing to hit."""
    return _Run(job, seconds, chance).run()


class _Run:
    """A job under way: `now`, steps `done` by this attempt, steps `kept` by the newest save that can be loaded."""

    def __init__(self, job: Job, seconds: float, chance: Chance) -> None:
        self.job, self.chance, self.end = job, chance, seconds
        self.out = Outcome(seconds)
        self.now, self.done, self.kept = 0.0, 0, 0
        self.writing: list[tuple[float, int]] = []  # (time from which it can be loaded, steps)
        self.next = 0  # index of the failure to come
        self.spell = 0  # of the slow spell that is not over
        self.sound = job.spares
        self.repairs: list[float] = []  # times at which nodes come back

    def run(self) -> Outcome:
        while self.now < self.end:
            if self._train() and self._save():
                continue
            if self.now < self.end:
                self._recover()
        self.out.steps = self.done
        self.out.trained = self.done * self.job.step
        return self.out

    def _stop(self) -> float:
        """When the next failure or the end comes."""
        failures = self.chance.failures
        return min(self.end, failures[self.next].time) if self.next < len(failures) else self.end

    def _train(self) -> bool:
        """Steps up to the next save. False if something stops them: whole steps remain, the one under way is lost."""
        job, stop = self.job, self._stop()
        left = job.every - self.done % job.every if job.every else math.inf
        while left > 0:
            steps, length = self._steps(left, stop)
            self.now += steps * length
            self.done += steps
            self.out.slowed += steps * (length - job.step)
            left -= steps
            if left > 0 and self.now + self._length(self.now) > stop:
                self.out.lost += stop - self.now
                self.now = stop
                return False
        return True

    def _length(self, start: float) -> float:
        """Seconds of a step that starts then: slow if it starts in a slow spell."""
        slow = self.chance.slow
        while self.spell < len(slow) and slow[self.spell][1] <= start:
            self.spell += 1
        inside = self.spell < len(slow) and slow[self.spell][0] <= start
        return self.job.step * (self.job.slow_factor if inside else 1.0)

    def _steps(self, left: float, stop: float) -> tuple[int, float]:
        """How many whole steps start before their length changes, and that length. They end before `stop`."""
        length = self._length(self.now)
        slow = self.chance.slow
        until = math.inf
        if self.spell < len(slow):
            first, last = slow[self.spell]
            until = last if first <= self.now else first
        starting = math.ceil((until - self.now) / length) if math.isfinite(until) else math.inf
        fitting = math.floor((stop - self.now) / length + 1e-9)
        return int(min(left, starting, fitting)), length

    def _save(self) -> bool:
        """False if something stops it. It begins when the save before it is written."""
        stop = self._stop()
        ready = max(self.now, self.writing[-1][0]) if self.writing else self.now
        until = min(stop, ready + self.job.save)
        self.out.saving += until - self.now
        self.now = until
        if ready + self.job.save > stop:
            return False
        self.writing.append((self.now + self.job.written, self.done))
        self.out.events.append((self.now, f"saved step {self.done}"))
        return True

    def _recover(self) -> None:
        """From a failure to the first step, or to the end. Failures during a restart start it again."""
        job, out = self.job, self.out
        ready = list(takewhile(lambda save: save[0] <= self.now, self.writing))
        self.kept = ready[-1][1] if ready else self.kept
        self.writing = []
        out.lost += (self.done - self.kept) * job.step
        out.events.append((self.now, f"failed at step {self.done}, back to {self.kept}"))
        self.done = self.kept
        while self.now < self.end:
            out.failures += 1
            node = self.chance.failures[self.next].node
            self.next += 1
            if node:
                self._wait(self._node() - self.now + job.queue)
            stop = self._stop()
            length = job.restart if node else job.in_place_restart
            begun, self.now = self.now, min(stop, self.now + length)
            out.restarting += self.now - begun
            if begun + length <= stop:
                out.events.append((self.now, f"training from step {self.done}"))
                return

    def _node(self) -> float:
        """When a sound node is there in place of the broken one."""
        if self.sound is None:
            return self.now
        heapq.heappush(self.repairs, self.now + self.job.repair)
        while self.repairs and self.repairs[0] <= self.now:
            heapq.heappop(self.repairs)
            self.sound += 1
        if self.sound:
            self.sound -= 1
            return self.now
        return heapq.heappop(self.repairs)

    def _wait(self, length: float) -> None:
        """Waits for nodes; what fails meanwhile is not the job's."""
        until = min(self.end, self.now + length)
        self.out.waiting += until - self.now
        self.now = until
        while self.next < len(self.chance.failures) and self.chance.failures[self.next].time < self.now:
            self.next += 1
