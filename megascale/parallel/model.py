"""The state of a rank after the passes: its weights with their placement, and the modules to call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megascale.comm.collectives import all_reduce
from megascale.comm.dtensor import is_dtensor
from megascale.comm.mesh import Mesh
from megascale.comm.piece import Piece, chunk_bounds
from megascale.model.family import Family
from megascale.model.init import initialize
from megascale.model.ops.grouped_matmul import adds_in_place
from megascale.model.spec import ParamSpec
from megascale.parallel.tensor import Placement, local_tensor

# Called around each micro-batch with "is it the last one of the step?"
MicroBatchScope = Callable[[bool], AbstractContextManager[None]]


@dataclass(frozen=True)
class Weight:
    """A parameter as its rank holds it: `parameter` with its gradient, and the placement of its part."""

    name: str
    parameter: nn.Parameter
    placement: Placement
    replicas: int  # ranks that hold the same part

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards it further, over the axis in its placement."""
        return is_dtensor(self.parameter)

    @property
    def local(self) -> Tensor:
        """This rank's storage, padding included, without autograd."""
        return local_tensor(self.parameter)

    @property
    def local_grad(self) -> Tensor | None:
        grad = self.parameter.grad
        # `to_local` is for autograd, and takes 20 µs of the host a weight and pass; a gradient has no history.
        return grad._local_tensor if grad is not None and is_dtensor(grad) else grad

    def forget_gradient(self) -> None:
        """After its update. A gradient that products add to in place stays and is zeroed: on a CPU, filling new memory for 25M weights
        takes 48 ms because of page faults, zeroing 5 ms.
        """
        parameter = self.parameter
        if self.placement.spec.experts and not self.sharded and parameter.grad is not None and adds_in_place(parameter):
            parameter.grad.zero_()
        else:
            parameter.grad = None


@dataclass(frozen=True)
class State:
    """A declared buffer, whole on every rank that holds its layer."""

    name: str
    spec: ParamSpec
    tensor: Tensor

    @property
    def piece(self) -> Piece:
        return Piece(self.spec.shape, (0,) * len(self.spec.shape), self.tensor)


@dataclass(frozen=True)
class ParallelModel:
    """What one rank holds: its `stages` (one without a pipeline) and the `modules` to call for them, in stage order.

    `weights` in canonical order, `states` the buffers that checkpoints also keep. `tied_copy` is the last stage's copy of a tied embedding
    if another stage owns it: it takes the owner's value before a step and adds its gradient after, so that norm, optimizer and checkpoint
    handle only one weight.
    """

    stages: list[Family]
    modules: list[nn.Module]
    weights: list[Weight]
    states: list[State]
    tied_copy: Weight | None
    mesh: Mesh
    micro_batch: MicroBatchScope  # entered around each forward and backward with "is it the last?", without a pipeline

    @property
    def model(self) -> Family:
        return self.stages[0]

    @property
    def module(self) -> nn.Module:
        return self.modules[0]

    def at_step(self, step: int) -> None:
        """Sets the global step, counted from 1, that BranchNorm's coefficient follows: before each step, and before an evaluation."""
        for stage in self.stages:
            stage.at_step(step)

    def train(self, mode: bool) -> None:
        for module in self.modules:
            module.train(mode)

    def piece(self, weight: Weight, local: Tensor) -> Piece:
        """The rectangle of the unsharded tensor covered by `local` (the weight, or a state shaped like it), without padding."""
        placement = weight.placement
        shape, whole = placement.spec.shape, placement.shape
        offset = [0] * len(shape)
        for cut in placement.cuts:
            offset[cut.dim] = self.mesh[cut.axis].rank * cut.part
        if weight.sharded:
            axis, dim = self.mesh[placement.shard], placement.shard_dim
            offset[dim] += chunk_bounds(whole[dim], axis.size, axis.rank)[0]
        keep = tuple(slice(0, max(0, min(n, s - o))) for n, s, o in zip(local.shape, shape, offset))
        return Piece(shape, tuple(min(o, s) for o, s in zip(offset, shape)), local[keep])

    def finish_gradients(self, weights: list[Weight] | None = None) -> None:
        """After the last micro-batch: sums gradients that are partial over the tensor axis (of `weights` only, if given), in one
        message.
        """
        grads = [g for w in (self.weights if weights is None else weights) if w.placement.partial and (g := w.local_grad) is not None]
        if grads:
            flat = all_reduce(torch.cat([g.flatten() for g in grads]), self.mesh["tp"])
            torch._foreach_copy_(grads, [part.view_as(g) for g, part in zip(grads, flat.split([g.numel() for g in grads]))])

    def draw_weights(self, seed: int) -> Iterator[str]:
        """Initializes every weight from (seed, name), yielding names as it goes."""
        for w in self.weights:
            with torch.no_grad():
                w.local.zero_()  # vocabulary padding stays zero, since its gradient is zero
                initialize(self.piece(w, w.local), w.name, w.placement.spec, seed)
            yield w.name
        for state in self.states:
            initialize(state.piece, state.name, state.spec, seed)
            yield state.name
