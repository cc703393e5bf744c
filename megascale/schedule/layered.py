"""Layered accumulation: all micro-batches pass a layer before the next layer starts, so its weights cross the network once per direction.

The order is data (orders.py: `layered_order`); this file executes it over stages of one layer each, all on this rank. The graph is cut
between stages: a stage's input passes a `_Door`, which keeps the gradient that leaves through it, and backward starts at the edge of the
stage's output. So nothing here holds an activation, and block inputs may live elsewhere (parallel/offload.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.fsdp import FSDPModule, fully_shard

from megascale.data.loader import Batch
from megascale.model.family import Family
from megascale.model.loss import one_for
from megascale.parallel.model import ParallelModel
from megascale.schedule.fsdp_roots import forget_order, share_buffers
from megascale.schedule.orders import Action, layered_forward_order, layered_order
from megascale.schedule.tied import TiedEmbedding


class Layered:
    """`breadth`: micro-batches that pass a stage together; None: all of a step."""

    def __init__(self, model: ParallelModel, breadth: int | None) -> None:
        self.model, self.breadth = model, breadth
        self.tied = TiedEmbedding(model)
        self.after_stage: Callable[[int], None] | None = None  # called as soon as a stage's gradients are complete
        for stage in model.stages:
            if isinstance(stage, FSDPModule):
                stage.set_reshard_after_backward(False)
                stage.set_requires_gradient_sync(False)
                # Stages finish together at the end of the step: until then their reductions overlap with the next stage's backward.
                stage.set_is_last_backward(False)
        share_buffers(model.stages)
        first = model.stages[0]
        if isinstance(first, FSDPModule):
            first.set_unshard_in_backward(False)  # its table's gradient needs no values, and its other weights are copied

    def run(self, batches: Sequence[Batch], scale: float) -> Tensor:
        self.model.mesh.traffic.micro_batch()  # weights may change within a step, so it cannot be interrupted
        self.tied.broadcast_value()
        pass_ = _Pass(self.model, batches, scale)
        for step in layered_order(len(self.model.stages), len(batches), self.breadth or len(batches)):
            pass_.do(step)
            if step.kind == "U" and step.stage in pass_.reduced and self.after_stage is not None:
                self._hand_over(step.stage)
        if self.after_stage is None:
            self._finish(self.model.stages)
            self.tied.reduce_grad()
            self.model.finish_gradients()
        return torch.stack(pass_.losses).sum()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        self.model.mesh.traffic.micro_batch()
        self.tied.broadcast_value()
        pass_ = _Pass(self.model, batches, 1.0)
        for step in layered_forward_order(len(self.model.stages), len(batches)):
            pass_.do(step)
        return torch.stack(pass_.losses).to(torch.float64).sum()

    def _hand_over(self, number: int) -> None:
        assert self.after_stage is not None
        self._finish([self.model.stages[number]])
        if number == 0:
            self.tied.reduce_grad()
        self.after_stage(number)

    def _finish(self, stages: list[Family]) -> None:
        """Waits for the reductions of `stages`, as FSDP2 does after a last backward."""
        for stage in stages:
            if isinstance(stage, FSDPModule):
                stage.set_is_last_backward(True)
                fully_shard.state(stage)._root_post_backward_final_callback()  # type: ignore[attr-defined]
                stage.set_is_last_backward(False)


class _Pass:
    """One pass of micro-batches through the stages. `doors` and `ends` have where the graph of a (stage, micro-batch) starts and ends."""

    def __init__(self, model: ParallelModel, batches: Sequence[Batch], scale: float) -> None:
        self.model, self.batches, self.scale = model, batches, scale
        self.losses: list[Tensor] = []
        self.streams: dict[int, Tensor] = {}  # by micro-batch: input of the next stage
        self.grads: dict[int, Tensor] = {}  # by micro-batch: gradient for the previous stage
        self.ends: dict[tuple[int, int], GradientEdge] = {}
        self.doors: dict[tuple[int, int], list[Tensor]] = {}
        self.reduced: set[int] = set()  # stages whose last backward has been announced
        self.anchor = torch.zeros((), requires_grad=True)

    def do(self, step: Action) -> None:
        stage = self.model.stages[step.stage]
        sharded = isinstance(stage, FSDPModule)
        if step.kind == "R":
            self.reduced.add(step.stage)
        match step.kind:
            case "F":
                self.forward(step.stage, step.micro_batch)
            case "B":
                self.backward(step.stage, step.micro_batch)
            case "G" if sharded:
                for group in _groups(stage):
                    group.unshard(async_op=True)
            case "R" if sharded:
                stage.set_requires_gradient_sync(True)  # type: ignore[operator]
                stage.set_requires_all_reduce(len(self.losses) == len(self.batches))  # type: ignore[operator]
            case "U" if sharded:
                for group in _groups(stage):
                    group.reshard()
                stage.set_requires_gradient_sync(False)  # type: ignore[operator]

    def forward(self, number: int, i: int) -> None:
        self.model.mesh.traffic.moved += 1
        b, key, x = self.batches[i], (number, i), self.streams.pop(i, None)
        if x is not None and torch.is_grad_enabled():
            self.doors[key] = []
            x = _Door.apply(self.anchor, x, self.doors[key])
        y = self.model.stages[number](**b.inputs(), scale=self.scale, stream=x)
        forget_order(self.model.stages[number])
        if torch.is_grad_enabled():
            self.ends[key] = get_gradient_edge(y)
        if number < len(self.model.stages) - 1:
            self.streams[i] = y.detach()
        else:
            self.losses.append(y.detach())
            self.grads[i] = one_for(y)

    def backward(self, number: int, i: int) -> None:
        key = number, i
        torch.autograd.backward(self.ends.pop(key), self.grads.pop(i))
        if number > 0:
            (self.grads[i],) = self.doors.pop(key)


def _groups(stage: Family) -> list[FSDPModule]:
    """FSDP2's groups of a stage: its weights, and its experts if they have their own axes."""
    return [m for m in stage.modules() if isinstance(m, FSDPModule)]


class _Door(torch.autograd.Function):
    """Identity on a stage's input; backward puts the input's gradient into `out`. The anchor makes the output require a gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, out: list[Tensor]) -> Tensor:
        ctx.out = out
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.out.append(grads[0])
        return None, None, None
