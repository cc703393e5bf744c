"""A run inside a Python program: the trainers, process group and checkpoints of `pretrain.py`, with the loop in the program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist

from megascale.comm.agreement import Agreement, on_all_ranks
from megascale.config.schema import Config, DataSource
from megascale.data.memory import NAME, PLACE, Samples, TokenLists
from megascale.errors import ExitCode, Halted, MegascaleError, OutOfMemoryError, PeerLostError, StopRequested, TrainingError, UsageError
from megascale.launch.exits import Exit, as_exit, write_exit
from megascale.launch.ranks import RankInfo, find_ranks
from megascale.parallel.model import ParallelModel
from megascale.train.faults.stop import StopFlag
from megascale.train.growing import trainers
from megascale.train.log.reporter import StepResult
from megascale.train.phases import Given
from megascale.train.process_group import final_barrier, process_group
from megascale.train.trainer import Trainer


class Session:
    """A run in progress. Iterating trains it, through growths too, and yields the result of each step: `number`, `loss`, `grad_norm`, `lr`,
    `valid_loss`. All ranks must iterate alike.
    """

    def __init__(self, phases: Iterator[Trainer], ranks: RankInfo, stop: StopFlag) -> None:
        self._phases, self._ranks, self._stop = phases, ranks, stop
        self.trainer = next(phases)
        self.last_step = self.trainer.config.train.total_steps  # the same in all phases
        self.busy = False  # inside a step or an evaluation: the trainer's state may be incomplete
        self.ended = False
        self._begun = False

    @property
    def config(self) -> Config:
        """The config, resolved for the current ranks."""
        return self.trainer.config

    @property
    def step(self) -> int:
        """Number of steps done, including those before a resume."""
        return self.trainer.progress.step

    @property
    def model(self) -> ParallelModel:
        """This rank's part of the model."""
        return self.trainer.model

    def __iter__(self) -> Iterator[StepResult]:
        """Raises StopRequested if the run was asked to stop, after writing a checkpoint."""
        self._begin(True)
        steps = self._steps()
        while True:
            self._check_open()
            with self._at_work():
                result = next(steps, None)
            if result is None:
                return
            yield result

    def evaluate(self) -> dict[str, float]:
        """The current mean loss per token of every validation set. Collective."""
        self._check_open()
        if not self.trainer.valid:
            raise UsageError("train.eval_every is 0, so no validation set is open: set it, and data.valid or data.valid_fraction")
        self.model.at_step(max(1, self.step))
        with self._at_work():
            try:
                losses = self.trainer.evaluate()
                self.trainer.reporter.observed.flush()  # rows tell of a run's own evaluations
                return losses
            except Halted:
                self.trainer.leave()

    def leave(self, why: str = "its loop was left") -> None:
        """Called after the program has left its loop. A finished run ends as usual; otherwise all ranks stop as on request, at the same
        step even if only one of them left its loop, with a checkpoint to continue from.
        """
        if not self.step:
            self._stop.reason = self._stop.reason or "left before its first step"
            self._begin(False)
            return
        if self.step < self.last_step:
            self._stop.reason = self._stop.reason or why
            if self._ranks.size > 1:
                self.trainer.activity.gate.await_agreement()
        try:
            for _ in self:
                pass
        except StopRequested:
            pass

    def leave_after(self, error: BaseException) -> bool:
        """After an error in the program's own code between two steps: saves the last step, as when the loop is left, and other ranks stop
        there too. Returns whether it did. An interrupt reaches ranks at different places, so only a single process saves after one.
        """
        if self.busy or not self.step or (self._ranks.size > 1 and not isinstance(error, Exception)):
            return False
        try:
            self.leave(f"its program raised {type(error).__name__}")
        except Exception as failure:  # the program's own error is the one to report
            self.trainer.reporter.warn_once("left", f"step {self.step} could not be saved ({type(failure).__name__}: {failure})")
            return False
        return True

    def _steps(self) -> Iterator[StepResult]:
        yield from self.trainer
        for trainer in self._phases:
            self.trainer = trainer
            yield from trainer

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """`busy` stays set if the work fails."""
        self.busy = True
        yield
        self.busy = False

    def _begin(self, going: bool) -> None:
        """The first step cannot be interrupted, so all ranks first learn whether all are `going` to make it. Raises StopRequested on ranks
        that are going if others are not. Collective.
        """
        if self._begun or self.step or self._ranks.size == 1:
            return
        self._begun = True
        with self._at_work():
            _, everyone = Agreement().all(lambda: going, lambda own: own)
        if going and not all(everyone):
            raise StopRequested(f"rank {everyone.index(False)} has left before the first step: nothing was trained, and nothing is saved")

    def _check_open(self) -> None:
        if self.ended:
            raise UsageError("the run has ended with its `with` block: open it again with megascale.training, and it continues from there")


# Keys that need a run directory.
WRITES: dict[str, Callable[[Config], bool]] = {
    "run.tensorboard": lambda c: c.run.tensorboard,
    "run.wandb": lambda c: c.run.wandb,
    "run.profile_step": lambda c: c.run.profile_step is not None,
    "checkpoint.export": lambda c: c.checkpoint.export != "none",
    "checkpoint.resume": lambda c: c.checkpoint.resume not in ("auto", "never"),
    "grow": lambda c: bool(c.grow),
}


def check_without_directory(config: Config) -> None:
    """Raises UsageError for a config with keys that need a run directory."""
    asked = [key for key, asks in WRITES.items() if asks(config)]
    if asked:
        keys = ", ".join(asked)
        raise UsageError(f"run_dir is None, so nothing is written, but the config sets {keys}: give run_dir, or leave those out")


def with_samples(config: Config) -> Config:
    """The config of a run that trains on samples in memory instead of the files of data.train."""
    place = [DataSource(path=PLACE, name=NAME)]
    return config.model_copy(update={"data": config.data.model_copy(update={"train": place})})


@contextmanager
def open_session(config: Config, samples: Samples | None, writes: bool) -> Iterator[Session]:
    """`writes` False: without a run directory. Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UsageError("torch.distributed already has a process group, but a run creates its own: leave that to megascale.training")
    if not writes:
        check_without_directory(config)
    if samples is not None:
        config = with_samples(config)
    threads = torch.get_num_threads()
    ranks, stop, ending = find_ranks(), StopFlag(), Exit(ExitCode.BUG, "the program left with an error")
    session: Session | None = None
    together = False  # whether all ranks leave here
    with ExitStack() as group:
        watch = group.enter_context(process_group(config, ranks))
        try:
            lists = on_all_ranks(lambda: None if samples is None else TokenLists(samples))
            given = Given(lists, writes, quiet=True)
            with trainers(config, ranks, stop, watch.activity, given) as phases:
                session = Session(phases, ranks, stop)
                try:
                    yield session
                except BaseException as error:
                    together = session.leave_after(error)
                    raise
                session.leave()
                together = True
            ending = (
                Exit(ExitCode.DONE, "done")
                if session.step == session.last_step
                else Exit(ExitCode.STOPPED, f"stopped on request ({stop.reason})")
            )
        except BaseException as error:
            own = session is None or session.busy  # the run's error, not the program's
            ending = ending_of(error, own)
            if isinstance(error, MegascaleError) or ending.code not in TOLD_AS:
                raise
            from megascale.train.faults.explain import explain

            ending = explain(ending, error, watch, config, ranks)
            raise TOLD_AS[ending.code](ending.reason) from error
        finally:
            if session is not None:
                session.ended = True
            watch.leaves(ending)
            write_exit(watch.run_dir, ending, ranks, watch.activity.step)
            if together or ending.code == ExitCode.STOPPED:
                final_barrier()
            torch.set_num_threads(threads)


# torch raises these as many different errors; a program catches each by one name.
TOLD_AS: dict[int, type[MegascaleError]] = {
    ExitCode.PEER_LOST: PeerLostError,
    ExitCode.OUT_OF_MEMORY: OutOfMemoryError,
    ExitCode.TRAINING: TrainingError,
}


def ending_of(error: BaseException, own: bool) -> Exit:
    """What exit.json says about an error that left the `with` block. `own`: the error is the run's, not the program's."""
    if isinstance(error, MegascaleError):
        return Exit(error.code, str(error))
    known = as_exit(error) if own and isinstance(error, Exception) else None
    return known or Exit(ExitCode.BUG, f"{type(error).__name__}: {error}".removesuffix(": "))
