"""The training loop, on one screen."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.checkpoint.saver import Checkpointer, Event
from megascale.config.schema import Config
from megascale.data.loader import Batch, Prefetcher
from megascale.errors import StopRequested, TrainingError
from megascale.optim.schedule import learning_rate
from megascale.parallel.apply import ParallelModel
from megascale.parallel.precision import watched_casts
from megascale.precision.loss_scale import loss_scale
from megascale.precision.watch import sampled_step
from megascale.train.engine import Engine
from megascale.train.reporter import Reporter, StepClock, StepResult
from megascale.train.state import Progress
from megascale.train.stop import StopFlag
from megascale.train.watch import SAVING, Pulse


class Trainer:
    """Everything a run consists of, built by `setup.py`; `train()` is the loop."""

    def __init__(
        self,
        config: Config,
        model: ParallelModel,
        engine: Engine,
        batches: Prefetcher,
        valid: dict[str, list[list[Batch]]],
        checkpointer: Checkpointer,
        reporter: Reporter,
        stop: StopFlag,
        pulse: Pulse,
        progress: Progress,
        device: torch.device,
        until: int,
    ) -> None:
        self.config, self.model, self.engine = config, model, engine
        self.batches, self.valid, self.checkpointer = batches, valid, checkpointer
        self.reporter, self.stop, self.pulse, self.progress, self.device = reporter, stop, pulse, progress, device
        self.until = until  # a growth may come before the run's last step
        self.places = config.train.global_batch_size * config.train.seq_len
        self.scale = loss_scale(config) / self.places

    def train(self) -> None:
        """Runs to the last step, or a growth's. Raises StopRequested after a whole checkpoint, TrainingError when it cannot go on."""
        train, last_step, first_step = self.config.train, self.until, self.progress.step + 1
        while self.progress.step < last_step:
            step = self.progress.step + 1
            if step > first_step:
                self.pulse.at(step, "training")
            with self.reporter.profile(step):
                result = self.train_step(step, next(self.batches))
            self.progress.step, self.progress.samples = step, self.progress.samples + train.global_batch_size
            self.progress.tokens += self.places
            if train.eval_every and (step % train.eval_every == 0 or step == last_step):
                self.pulse.at(step, "evaluating")
                begin = time.perf_counter()
                result.valid_loss = self.evaluate()
                result.valid_seconds = time.perf_counter() - begin
            self.reporter.step(result, self.progress)
            stopping = self.reporter.stop_agreed()
            if self.progress.skipped_in_a_row > train.max_skipped_steps:
                self.give_up(step)
            if stopping or step == last_step or (self.config.checkpoint.every and step % self.config.checkpoint.every == 0):
                self.save(wait=stopping or step == last_step)
            self.told(self.checkpointer.poll(), step)
            if stopping and step < last_step:
                why = self.reason_to_stop()
                self.reporter.event("stop", step, reason=why)
                raise StopRequested(f"stopped on request ({why}) after step {step} of {last_step}: run the same command again to go on")

        if last_step == train.total_steps:
            self.reporter.event("done", self.progress.step)

    def train_step(self, step: int, micro_batches: list[Batch]) -> StepResult:
        """Forward, backward, clip, update. Nothing here waits for the device."""
        clock = StepClock(self.device)
        self.model.mesh.traffic.take()  # what evaluation sent is not the step's
        self.model.train(True)
        self.model.at_step(step)
        sampled = sampled_step(step, self.config)
        lr = learning_rate(self.config.optim, step, self.config.train.total_steps)
        with watched_casts(self.model.stages, sampled):
            loss = self.engine.run(micro_batches, self.scale, lr)
        valid = sum(b.valid for b in micro_batches)
        # Loss and gradients carry a fixed scale; the number of valid targets is known only to all ranks together.
        total_loss, total_valid, stop = self.sum_over_ranks(loss, valid * self.scale, float(self.stop.requested()))
        norm, finite = self.engine.update(total_valid)
        sent, seen = self.model.mesh.traffic.take()[0], self.reporter.observed.take()
        return StepResult(step, total_loss / total_valid, norm, finite, stop, lr, clock.stop(), sent, seen, sampled)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean loss per valid token of every validation set."""
        self.model.train(False)
        losses = {}
        for name, batches in self.valid.items():
            total = torch.stack([self.engine.evaluate(step) for step in batches]).sum()
            valid = sum(b.valid for step in batches for b in step)
            loss, count, _ = self.sum_over_ranks(total, float(valid), 0.0)
            losses[name] = (loss / count).item()
        return losses

    def sum_over_ranks(self, loss: Tensor, valid: float, stop: float) -> tuple[Tensor, Tensor, Tensor]:
        """Three numbers summed over the ranks in one message, ranks with the same data counted once."""
        mesh = self.model.mesh
        share = 1.0 if mesh["tp"].rank == 0 else 0.0
        # All stages and all of cp know the whole batch. Their losses add up: zero but at the head, and of a rank's own positions.
        counted = valid * share if mesh["pp"].rank == 0 and mesh["cp"].rank == 0 else 0.0
        numbers = torch.stack([loss.to(torch.float64) * share, *torch.tensor([counted, stop], dtype=torch.float64).to(self.device)])
        if mesh.size > 1:
            dist.all_reduce(numbers)
        a, b, c = numbers.unbind()
        return a, b, c

    def reason_to_stop(self) -> str:
        """What the first rank that was asked heard, told to all."""
        reasons: list[str | None] = [self.stop.reason]
        if self.model.mesh.size > 1:
            reasons = [None] * self.model.mesh.size
            dist.all_gather_object(reasons, self.stop.reason)
        rank, reason = next(((r, text) for r, text in enumerate(reasons) if text is not None), (0, "unknown"))
        return reason if rank == 0 else f"{reason} on rank {rank}"

    def save(self, wait: bool) -> None:
        """Starts a checkpoint of the present state; `wait` until it is whole."""
        self.pulse.at(self.progress.step, SAVING)
        begin = time.perf_counter()
        trainer = {**self.progress.plain(), **self.reporter.provenance}
        self.checkpointer.save(self.progress.step, self.engine.pieces(), trainer)
        events = self.checkpointer.finish() if wait else []
        self.reporter.event("save", self.progress.step, stalled=round(time.perf_counter() - begin, 4))
        if wait:
            self.told(events, self.progress.step)
            failed = [e for e in events if e.kind == "failed" and e.step == self.progress.step]
            if failed:
                last = self.reporter.last_good
                raise TrainingError(
                    f"the checkpoint of step {self.progress.step} could not be written: {failed[0].message}; the last good one is {last}"
                )

    def told(self, events: list[Event], step: int) -> None:
        """How saves have ended. Raises TrainingError where replicas differ between ranks: every later step would be lost."""
        self.reporter.checkpoints(events, step)
        apart = [e for e in events if e.kind == "diverged"]
        if apart:
            raise TrainingError(
                f"the checkpoint of step {apart[0].step} was not written: {apart[0].message}; the last good one is "
                f"{self.reporter.last_good}"
            )

    def give_up(self, step: int) -> None:
        self.reporter.checkpoints(self.checkpointer.finish(), step)  # so that the message names the last one for certain
        raise TrainingError(
            f"{self.progress.skipped_in_a_row} steps in a row up to step {step} had gradients that are not finite, and "
            f"train.max_skipped_steps is {self.config.train.max_skipped_steps}: lower optim.lr or look at the data; "
            f"the last good checkpoint is {self.reporter.last_good}"
        )
