"""The training loop, on one screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.checkpoint.saver import Checkpointer, Event, NoCheckpoints
from megascale.config.schema import Config
from megascale.data.loader import Batch, Prefetcher
from megascale.errors import Halted, OutOfMemoryError, PeerLostError, StopRequested, TrainingError
from megascale.evaluation.in_run import Evaluations
from megascale.model.ops.compiled import left_out
from megascale.optim.averages import averages_of, own_average, shown
from megascale.optim.learning_rate import learning_rate
from megascale.optim.spikes import SpikeGate
from megascale.parallel.model import ParallelModel
from megascale.parallel.precision import watched_casts
from megascale.precision.loss_scale import loss_scale
from megascale.precision.watch import sampled_step
from megascale.train.engines.engine import Engine, backward, total_over_ranks, update
from megascale.train.faults.stop import StopFlag
from megascale.train.faults.watchdog import SAVING, Activity
from megascale.train.garbage import collected_every
from megascale.train.log.reporter import Reporter, StepClock, StepResult
from megascale.train.phases import Phase
from megascale.train.process_group import end_start
from megascale.train.state import Progress


class Trainer:
    """Everything a run consists of, built by `setup.py`. Iterating over it trains: it yields the result of each step.

    valid  by validation set: a function from a step, counted from 0, to its micro-batches
    saved  the step of the run's own checkpoint that it continues from, if any
    gate   what decides on spikes, from the phase before; a new one, or the checkpoint's, if absent
    """

    def __init__(
        self,
        *,
        config: Config,
        model: ParallelModel,
        engine: Engine,
        batches: Prefetcher,
        valid: Mapping[str, Callable[[int], list[Batch]]],
        checkpointer: Checkpointer | NoCheckpoints,
        reporter: Reporter,
        stop: StopFlag,
        activity: Activity,
        progress: Progress,
        device: torch.device,
        phase: Phase,
        evaluations: Evaluations,
        saved: int | None = None,
        gate: SpikeGate | None = None,
    ) -> None:
        self.config, self.model, self.engine = config, model, engine
        self.batches, self.valid, self.checkpointer = batches, valid, checkpointer
        self.reporter, self.stop, self.activity, self.progress, self.device = reporter, stop, activity, progress, device
        self.evaluations = evaluations
        self.phase, self.until = phase, phase.until  # more phases may come before the run's last step
        self.places = config.train.global_batch_size * config.train.seq_len
        self.scale = loss_scale(config) / self.places
        self.first_step, self.origin = progress.step + 1, reporter.last_good
        self.gate = spike_gate(config, progress, device) if gate is None else gate
        self.saved = saved  # the step whose checkpoint is written or being written
        self.stalled = 0.0  # seconds in evaluation and saving since the last step
        self.done = False
        self.in_training: bool | None = None  # the modules' mode, set only when it changes: hundreds of them take 10 ms

    def train(self) -> None:
        """Runs to the last step, or to a growth's. Raises StopRequested after the checkpoint is written, TrainingError if it cannot
        continue.
        """
        for _ in self:
            pass

    def __iter__(self) -> Iterator[StepResult]:
        """Like `train`, one step per iteration. A caller that leaves the loop may continue with another one."""
        with collected_every(self.config.run.gc_every) as collect:
            for result in self.steps():
                yield result
                collect(result.step)

    def steps(self) -> Iterator[StepResult]:
        train, last_step = self.config.train, self.until
        while self.progress.step < last_step:
            step = self.progress.step + 1
            if step > self.first_step:
                self.activity.at(step, "training")
            if step == self.first_step + 2:
                end_start(self.config, (axis.group for axis in self.model.mesh.axes.values()))
            if step == self.first_step + 1 and self.config.parallel.compile and (eager := left_out()):
                self.reporter.warn_once("eager", eager)
            # A run's first step cannot be interrupted: before it there is nothing to save.
            self.model.mesh.traffic.gate = self.activity.gate.enter if self.progress.step else None
            try:
                with self.reporter.profile(step):
                    result = self.next_step(step)
            except Halted:
                self.leave()
            self.progress.step, self.progress.samples = step, self.progress.samples + train.global_batch_size
            self.progress.tokens += self.places
            halted = False
            ends = step == last_step and not self.phase.flows
            if (train.eval_every and (step % train.eval_every == 0 or ends)) or self.evaluations.due(step):
                halted = not self.evaluated(result, ends)
            self.reporter.step(result, self.progress)
            if frozen := self.activity.thawed():
                self.reporter.frozen(step, frozen)
            if self.progress.skipped_in_a_row > train.max_skipped_steps:
                self.give_up(step)
            if (halted or self.reporter.stop_agreed()) and step < train.total_steps:
                self.leave()
            if ends or (self.config.checkpoint.every and step % self.config.checkpoint.every == 0):
                self.save(wait=ends)
            self.told(self.checkpointer.poll())
            yield result

        if last_step == train.total_steps and not self.done:
            self.done = True
            self.reporter.event("done", self.progress.step)

    def next_step(self, step: int) -> StepResult:
        begin = time.perf_counter()
        micro_batches = next(self.batches)
        waited = time.perf_counter() - begin
        result = self.train_step(step, micro_batches)
        result.waited, result.stalled, self.stalled = waited, self.stalled, 0.0
        return result

    def train_step(self, step: int, micro_batches: list[Batch]) -> StepResult:
        """Forward, backward, clip, update. Nothing here waits for the device: tests/test_host_syncs.py checks every operation."""
        clock = StepClock(self.device)
        self.model.mesh.traffic.take()  # traffic of evaluation does not count for the step
        self.set_mode(training=True)
        self.model.at_step(step)
        sampled = sampled_step(step, self.config)
        lr = learning_rate(self.config.optim, self.phase.rates.at(step), self.phase.rates.total)
        with watched_casts(self.model.stages, sampled):
            sums = backward(self.engine, micro_batches, self.scale, lr, self.stop.requested)
        done = update(self.engine, sums, self.gate)
        sent, seen = self.model.mesh.traffic.take()[0], self.reporter.observed.flush()
        numbers = torch.stack([x.to(torch.float64) for x in (done.loss, done.norm, done.moved, sums.valid, sums.stop)])
        return StepResult(step, numbers, lr, clock.stop(), sent, seen, sampled)

    def set_mode(self, training: bool) -> None:
        if self.in_training != training:
            self.model.train(training)
            self.in_training = training

    def evaluated(self, result: StepResult, ends: bool) -> bool:
        """Adds the validation losses and evaluations that are due to a step's result. False if all ranks left early: then there are
        none.
        """
        self.activity.at(result.step, "evaluating")
        begin = time.perf_counter()
        try:
            if (every := self.config.train.eval_every) and (result.step % every == 0 or ends):
                result.valid_loss = self.evaluate()
                for source, totals in self.reporter.observed.flush().items():
                    result.seen[source].update(totals)
            if due := self.evaluations.due(result.step):
                self.set_mode(training=False)
                result.evaluate = self.evaluations.run(due, self.engine)
                self.reporter.observed.flush()  # of other texts than the row tells of
        except Halted:
            self.reporter.event("evaluation_cut_short", result.step)
            return False
        result.valid_seconds = time.perf_counter() - begin
        self.stalled += result.valid_seconds
        return True

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean loss per valid token of every validation set, then the same with each average of the weights; NaN if a set has no
        targets.
        """
        self.set_mode(training=False)
        optim = self.config.optim
        with shown(self.model, self.engine.state(), own_average(optim)):
            losses = self.losses_of_sets()
        for average in averages_of(optim) if optim.ema_valid else ():
            with shown(self.model, self.engine.state(), average):
                losses |= self.losses_of_sets(f" ema {average.name}")
        return losses

    def losses_of_sets(self, ending: str = "") -> dict[str, float]:
        losses, steps = {}, self.config.train.eval_steps
        for name, make in self.valid.items():
            batches = Prefetcher(make, 0, steps - 1)
            try:
                total, valid = self.evaluate_all(batches)
            finally:
                batches.close()
            loss, count, _ = total_over_ranks(self.model.mesh, total, float(valid))
            if not count.item():
                self.reporter.warn_once(f"no target in {name}", f"the validation set {name} has no target in its {steps} batches")
            losses[name + ending] = (loss / count).item()
        return losses

    def evaluate_all(self, batches: Iterable[list[Batch]]) -> tuple[Tensor, int]:
        """Loss and number of the valid targets of this rank's micro-batches, which are freed step by step."""
        parts, valid = [], 0
        for step in batches:
            parts.append(self.engine.evaluate(step))
            valid += sum(b.valid for b in step)
        return torch.stack(parts).sum(), valid

    def reason_to_stop(self) -> str:
        """The reason of the first rank that was asked to stop, on all ranks. Collective."""
        reasons: list[str | None] = [self.stop.reason]
        if self.model.mesh.size > 1:
            reasons = [None] * self.model.mesh.size
            dist.all_gather_object(reasons, self.stop.reason)
        rank, reason = next(((r, text) for r, text in enumerate(reasons) if text is not None), (0, "unknown"))
        return reason if rank == 0 else f"{reason} on rank {rank}"

    def leave(self) -> NoReturn:
        """Stops all ranks after the last complete step: writes its rows and its checkpoint, then raises StopRequested. Collective."""
        step = self.progress.step
        self.reporter.flush()
        for weight in self.model.weights:
            weight.forget_gradient()  # of the interrupted step
        self.activity.at(step, SAVING)
        self.told(self.checkpointer.finish())
        if self.saved != step:
            self.save(wait=True)
        why = self.reason_to_stop()
        self.reporter.event("stop", step, reason=why)
        last = self.config.train.total_steps
        kept = "nothing of it is kept" if self.checkpointer.root is None else "run the same command again to continue"
        raise StopRequested(f"stopped on request ({why}) after step {step} of {last}: {kept}")

    def save(self, wait: bool) -> None:
        """Starts a checkpoint of the current state; `wait`: until it is written."""
        step = self.progress.step
        self.activity.at(step, SAVING)
        begin = time.perf_counter()
        self.progress.spikes = {} if self.gate is None else self.gate.plain()
        trainer = {**self.progress.plain(), **self.reporter.provenance}
        self.checkpointer.save(step, self.engine.pieces(), trainer)
        self.saved = step
        events = self.checkpointer.finish() if wait else []
        stalled = time.perf_counter() - begin
        self.stalled += stalled
        self.reporter.event("save", step, stalled=round(stalled, 4))
        self.told(events)
        failed = [e for e in events if e.kind == "failed" and e.step == step]
        if failed:
            kind = OutOfMemoryError if failed[0].code == OutOfMemoryError.code else TrainingError
            raise kind(
                f"the checkpoint of step {step} could not be written: {failed[0].message}; the last good one is {self.reporter.last_good}"
            )

    def told(self, events: list[Event]) -> None:
        """Handles the outcomes of saves. Raises TrainingError if replicas differ between ranks, since every later step would be lost, and
        PeerLostError if a peer was lost during a save.
        """
        if any(e.kind == "failed" and e.step == self.saved for e in events):
            self.saved = None
        self.reporter.checkpoints(events, self.progress.step)
        apart = [e for e in events if e.kind == "diverged"]
        if apart:
            raise TrainingError(
                f"the checkpoint of step {apart[0].step} was not written: {apart[0].message}; the last good one is "
                f"{self.reporter.last_good}"
            )
        lost = [e for e in events if e.kind == "failed" and e.code == PeerLostError.code]
        if lost:
            raise PeerLostError(
                f"the checkpoint of step {lost[0].step} could not be written: {lost[0].message}; the last good one is "
                f"{self.reporter.last_good}; run the same command again"
            )

    def give_up(self, step: int) -> NoReturn:
        self.told(self.checkpointer.finish())  # so that the message surely names the last good one
        skipped = self.progress.skipped_in_a_row
        what = (
            f"{skipped} steps in a row up to step {step} had gradients that are not finite, and train.max_skipped_steps is "
            f"{self.config.train.max_skipped_steps}"
        )
        spoiled = self.spoiled_weights()
        if not spoiled:
            raise TrainingError(f"{what}: lower optim.lr or look at the data; the last good checkpoint is {self.reporter.last_good}")
        # Skipped steps change nothing: the weights were bad before the first of them, and so are checkpoints saved since.
        many = f"{len(spoiled)} of the model's weights hold values that are not finite ({spoiled[0]} is the first)"
        if skipped > step - self.first_step:
            came = f"from {self.origin}" if self.origin != "none" else "from their start: look at model.init_std"
            raise TrainingError(f"{what}: {many}, already {came}; no learning rate fixes that: start from other weights")
        raise TrainingError(
            f"{what}: {many}, so the last checkpoint that may be good is one from before step {step - skipped}: go back to it with "
            "checkpoint.resume=FOLDER, and lower optim.lr"
        )

    def spoiled_weights(self) -> list[str]:
        """Names of weights that are not finite on some rank. Collective."""
        here = [w.name for w in self.model.weights if not torch.isfinite(w.local).all()]
        everywhere = [here]
        if self.model.mesh.size > 1:
            everywhere = [[] for _ in range(self.model.mesh.size)]
            dist.all_gather_object(everywhere, here)
        return list(dict.fromkeys(name for names in everywhere for name in names))


def spike_gate(config: Config, progress: Progress, device: torch.device) -> SpikeGate | None:
    """The gate that the config asks for, with the window of the checkpoint, if any."""
    if config.train.skip_spikes is None:
        return None
    gate = SpikeGate(config.train.skip_spikes, device)
    if progress.spikes:
        gate.load(progress.spikes)
    return gate
