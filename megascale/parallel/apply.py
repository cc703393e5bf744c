"""The passes over a finished model, in one ordered list, and what the rest of the system needs to know of the result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megascale.comm.collectives import all_reduce
from megascale.comm.mesh import Axis, Mesh
from megascale.comm.piece import Piece, chunk_bounds
from megascale.config.schema import Model, Parallel
from megascale.config.stages import stage_parts, stages_of_rank
from megascale.model.decoder import Decoder, Shape
from megascale.model.families import Family, build_part
from megascale.model.init import initialize
from megascale.model.layers import Fp8
from megascale.model.ops.grouped_matmul import adds_in_place
from megascale.model.ops.norm_kernels import NormKernel
from megascale.model.spec import ParamSpec, specs_of, states_of
from megascale.parallel.context import spread_sequence
from megascale.parallel.data import MicroBatchScope, replicate_model, shard_model
from megascale.parallel.expert import cut_experts
from megascale.parallel.grid import spread_grid
from megascale.parallel.offload import offload_block_inputs
from megascale.parallel.precision import gather_in_fp8, multiply_in_fp8
from megascale.parallel.recompute import compile_blocks, recompute_blocks
from megascale.parallel.tensor import Placement, cut_model, local_tensor


@dataclass(frozen=True)
class Weight:
    """A parameter as its rank holds it: `parameter` with its gradient, and where its part stands in the whole."""

    name: str
    parameter: nn.Parameter
    placement: Placement
    replicas: int  # ranks that hold the same part

    @property
    def sharded(self) -> bool:
        """Cut further by FSDP2, over the axis that its placement names."""
        return isinstance(self.parameter, DTensor)

    @property
    def local(self) -> Tensor:
        """This rank's storage, padding included, without autograd."""
        return local_tensor(self.parameter)

    @property
    def local_grad(self) -> Tensor | None:
        return None if self.parameter.grad is None else local_tensor(self.parameter.grad)

    def forget_gradient(self) -> None:
        """After its update. What products add to in place stays and becomes zero: filling new memory for 25M weights takes a CPU 48 ms, for
        its pages; zeroing what is there 5.
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

    `weights` in canonical order, `states` what checkpoints keep beside them. `guest` is the last stage's copy of a tied embedding, where
    another stage owns it: it takes the owner's value before a step and gives its gradient after, so that norm, optimizer and checkpoint
    know one weight only.
    """

    stages: list[Family]
    modules: list[nn.Module]
    weights: list[Weight]
    states: list[State]
    guest: Weight | None
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
        """The rectangle of the unsharded tensor that `local` (the weight, or a state shaped like it) covers; padding is cut off."""
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
        """After the last micro-batch: gradients (of `weights` alone, where given) that are shares of a sum over the tensor axis are summed,
        in one message.
        """
        grads = [g for w in (self.weights if weights is None else weights) if w.placement.partial and (g := w.local_grad) is not None]
        if grads:
            flat = all_reduce(torch.cat([g.flatten() for g in grads]), self.mesh["tp"])
            torch._foreach_copy_(grads, [part.view_as(g) for g, part in zip(grads, flat.split([g.numel() for g in grads]))])

    def draw_weights(self, seed: int) -> Iterator[str]:
        """Gives every weight its start from (seed, name), yielding names as it goes."""
        for w in self.weights:
            with torch.no_grad():
                w.local.zero_()  # vocabulary padding stays zero for ever: its gradient is zero
                initialize(self.piece(w, w.local), w.name, w.placement.spec, seed)
            yield w.name
        for state in self.states:
            initialize(state.piece, state.name, state.spec, seed)
            yield state.name


def build_stages(cfg: Model, shape: Shape, norm_kernel: NormKernel, parallel: Parallel, pp_rank: int) -> list[Family]:
    """The meta modules of one pipeline rank, in stage order; the whole model where there is no pipeline."""
    parts = stage_parts(cfg, parallel, shape.seq_len, shape.source_len)
    mine = stages_of_rank(parallel.pp_schedule, parallel.pp, parallel.pp_virtual, pp_rank) if parallel.pp > 1 else range(len(parts))
    return [build_part(cfg, shape, norm_kernel, parts[i]) for i in mine]


def cut_stage(stage: Family, axes: Mapping[str, Axis], cfg: Parallel) -> dict[str, Placement]:
    """The passes that cut layers themselves. Name → where this rank's part of each weight stands, of which it now has the shape."""
    placements = cut_model(stage, specs_of(stage), axes["tp"], cfg.tp_sequence)
    return placements if stage.cfg.moe is None else cut_experts(stage, placements, axes, cfg)


def parallelize(stages: list[Family], mesh: Mesh, cfg: Parallel, device: torch.device, fp8: Fp8 = "false") -> ParallelModel:
    """Meta modules → this rank's part of them, in memory but not yet drawn. `fp8`: how hidden products are computed."""
    weights: list[Weight] = []
    states: list[State] = []
    modules, guest = [], None
    micro_batch: MicroBatchScope = lambda last: nullcontext()  # noqa: E731
    pipeline, layered, on_host = mesh["pp"].size > 1, cfg.accumulation == "layered", "parameters" in cfg.offload
    # Ranks with other samples, or with other tokens of the same, sum the gradients of the same weights.
    copies = mesh["dp_replicate"].size * mesh["shard"].size > 1
    sharded = cfg.engine == "fsdp2" and (copies or mesh["edp"].size > 1)
    for stage in stages:
        module: nn.Module = stage
        placements = cut_stage(stage, mesh.axes, cfg)
        if isinstance(stage, Decoder):
            spread_sequence(stage, mesh, cfg)
        else:
            spread_grid(stage, mesh, cfg)
        state_specs = states_of(stage)
        multiply_in_fp8(stage, fp8)
        recompute_blocks(stage, cfg.recompute)
        if cfg.compile:
            compile_blocks(stage)
        if "activations" in cfg.offload:
            offload_block_inputs(stage, device)
        if sharded:
            # A pipeline passes a stage once per micro-batch: it is gathered once a step, or every pass would gather it again.
            reshard = cfg.reshard_after_forward and not pipeline
            micro_batch = shard_model(stage, mesh, reshard, stage.shape.compute, layered, on_host, placements)
        allocate(stage, device, on_host)
        gather_in_fp8(stage, placements)
        stage.at_step(1)
        if cfg.engine == "ddp" and copies and not pipeline:
            module, micro_batch = replicate_model(stage, mesh)
        modules.append(module)
        for name, parameter in stage.named_parameters():
            placement = placements[name]
            shards = mesh[placement.shard].size if isinstance(parameter, DTensor) else 1
            parts = shards * math.prod(mesh[c.axis].size for c in placement.cuts)
            weight = Weight(name, parameter, placement, mesh.size // (parts * mesh["pp"].size))
            if name == "embedding.weight" and not stage.part.first:
                guest = weight
            else:
                weights.append(weight)
        states += [State(name, spec, stage.get_buffer(name)) for name, spec in state_specs.items()]
    return ParallelModel(stages, modules, weights, states, guest, mesh, micro_batch)


def allocate(stage: Family, device: torch.device, on_host: bool) -> None:
    """Memory for weights (in the host's where they are offloaded) and buffers."""
    stage.to_empty(device="cpu" if on_host else device)
    for module in stage.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
