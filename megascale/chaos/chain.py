"""A chain of attempts at one run, each disturbed at a random moment, until the run is finished."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megascale.chaos.faults import PROCESS, damage
from megascale.chaos.job import Job

STARTING = 8.0  # seconds within which a fault during start-up strikes
PATIENCE = 5.0  # factor on the longest expected time, after which an attempt counts as hung


@dataclass(frozen=True)
class Layout:
    """Ranks, the overrides for their layout, and how they are started: alone, by hand or with torchrun (see `job.commands`)."""

    ranks: int
    overrides: tuple[str, ...]
    launcher: str

    def __str__(self) -> str:
        return " ".join([f"{self.ranks} rank{'s' * (self.ranks > 1)} {self.launcher}", *self.overrides])


@dataclass(frozen=True)
class Plan:
    """The settings of a chain.

    arguments  arguments of `megascale train`, shared by all attempts
    limit      run.collective_timeout in seconds
    calm       seconds that the undisturbed run took
    """

    arguments: tuple[str, ...]
    layouts: tuple[Layout, ...]
    steps: int
    limit: float
    faults: int
    minutes: float
    seed: int
    calm: float = 0.0

    @property
    def patience(self) -> float:
        """Seconds after which an attempt counts as hung: it may have to detect a lost peer and to run from start to end."""
        return PATIENCE * (self.limit + self.calm) + 60


@dataclass(frozen=True)
class Attempt:
    """What was done to one attempt, and the outcome.

    process_faults  each with the last step in metrics.jsonl when it struck; several if the ranks survive the first
    codes           exit codes of the started processes; None if they had to be killed
    ending          the code in exit.json; None without one
    before, after   the last step in metrics.jsonl
    """

    number: int
    layout: str
    file_fault: str | None
    process_faults: tuple[tuple[str, int], ...]
    codes: list[int] | None
    ending: int | None
    before: int
    after: int
    seconds: float
    traceback: bool
    message: str

    @property
    def faults(self) -> list[str]:
        return [*([] if self.file_fault is None else [self.file_fault]), *(name for name, _ in self.process_faults)]


def losses(run: Path) -> list[tuple[int, float | None]]:
    """(step, loss) of every valid row of a run's metrics, in file order."""
    found = []
    path = run / "metrics.jsonl"
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            found.append((int(row["step"]), None if row["loss"] is None else float(row["loss"])))
        except (ValueError, TypeError, KeyError):
            continue
    return found


def last_step(run: Path) -> int:
    rows = losses(run)
    return rows[-1][0] if rows else 0


def undisturbed(plan: Plan, folder: Path) -> Job:
    """The run to compare with, on the first layout; the caller waits for it."""
    layout = plan.layouts[0]
    return Job(layout.launcher, layout.ranks, [*plan.arguments, *layout.overrides, f"run.dir={folder}"], folder.parent, folder.name)


def disturbed(plan: Plan, run: Path) -> Iterator[Attempt]:
    """Yields attempts until the run is finished or three in a row make no progress. After the time is up, no more faults."""
    chance, done, number, stuck = random.Random(plan.seed), 0, 0, 0
    end = time.monotonic() + 60 * plan.minutes
    while stuck < 3:
        number += 1
        attempt = one_attempt(plan, run, number, plan.faults - done if time.monotonic() < end else 0, chance)
        done += len(attempt.faults)
        stuck = stuck + 1 if attempt.after <= attempt.before and not attempt.process_faults else 0
        yield attempt
        if attempt.codes is not None and not any(attempt.codes) and attempt.after >= plan.steps:
            return


def one_attempt(plan: Plan, run: Path, number: int, faults_left: int, chance: random.Random) -> Attempt:
    """Possibly damages a file, starts the ranks, disturbs them at a random moment, waits until all are gone."""
    layout = chance.choice(plan.layouts)
    file_fault = damage(run, chance) if faults_left and number > 1 and chance.random() < 0.5 else None
    before, begun = last_step(run), time.monotonic()
    arguments = [*plan.arguments, *layout.overrides, f"run.dir={run}"]
    job = Job(layout.launcher, layout.ranks, arguments, run.parent, f"{run.name}-{number:03d}")
    struck: list[tuple[str, int]] = []
    while len(struck) < faults_left:  # the ranks survive some faults; then the next one strikes
        now = last_step(run)
        apart = max(2, 3 * (plan.steps - now) // max(1, faults_left - len(struck)))  # spreads the faults over the rest of the run
        moment = chance.choice(("starting", "training", "training", "saving") if not struck else ("training", "saving"))
        if not wait_for(moment, job, run, min(plan.steps, max(before, now) + chance.randrange(1, 1 + apart)), plan.patience, chance):
            break
        name, at = chance.choice(list(PROCESS)), last_step(run)
        if PROCESS[name](job, run, plan.limit, chance):
            struck.append((name, at))
    codes = job.wait(plan.patience)
    job.kill()
    text = job.text()
    return Attempt(
        number,
        str(layout),
        file_fault,
        tuple(struck),
        codes,
        exit_code(run),
        before,
        last_step(run),
        round(time.monotonic() - begun, 1),
        "Traceback (most recent call last)" in text and layout.launcher != "torchrun",  # torchrun prints one of its own
        "\n".join(text.strip().splitlines()[-4:]),
    )


def wait_for(moment: str, job: Job, run: Path, step: int, patience: float, chance: random.Random) -> bool:
    """Waits for the moment of a fault; False if the job ended before."""
    if moment == "starting":
        time.sleep(STARTING * chance.random())
        return job.running()
    end = time.monotonic() + patience
    while last_step(run) < step and time.monotonic() < end:
        if not job.running():
            return False
        time.sleep(0.02)
    while moment == "saving" and job.running() and time.monotonic() < end and not any((run / "checkpoints").glob(".tmp-step-*")):
        time.sleep(0.001)
    time.sleep((0.02 if moment == "saving" else 0.3) * chance.random())
    return job.running()


def exit_code(run: Path) -> int | None:
    try:
        return int(json.loads((run / "exit.json").read_bytes())["code"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def layouts_of(ranks: Sequence[int], overrides: Sequence[tuple[str, ...]]) -> tuple[Layout, ...]:
    """Every way to start every layout: one process alone, several by hand and under torchrun."""
    found = []
    for size, over in zip(ranks, overrides):
        found += [Layout(size, over, launcher) for launcher in (("alone",) if size == 1 else ("by hand", "torchrun"))]
    return tuple(found)
