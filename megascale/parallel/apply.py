"""The passes over a finished model in one ordered list, and what the rest of the system needs to know about the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from megascale.comm.dtensor import is_dtensor
from megascale.comm.functional import OVERLAP, counting_backend, share_memory
from megascale.comm.mesh import Axis, Mesh
from megascale.config.layout import even_dim, reshard_ranks
from megascale.config.schema import Model, Parallel
from megascale.config.stages import SPLIT_BACKWARD, stage_parts, stages_of_rank
from megascale.model.deferred import KEEPS_MEMORY
from megascale.model.families import build_part
from megascale.model.family import Family
from megascale.model.layers import Fp8
from megascale.model.norms import NormKernel
from megascale.model.ops.delta_kernel import Rule
from megascale.model.shape import Shape
from megascale.model.spec import MATRICES, specs_of, states_of
from megascale.parallel.context import spread_sequence
from megascale.parallel.expert import cut_experts
from megascale.parallel.grid import spread_grid
from megascale.parallel.kernels import call_norm_kernel, call_rule
from megascale.parallel.model import MicroBatchScope, ParallelModel, State, Weight
from megascale.parallel.offload import offload_block_inputs
from megascale.parallel.precision import gather_in_fp8, multiply_in_fp8
from megascale.parallel.recompute import wrap_blocks
from megascale.parallel.shadows import Shadows
from megascale.parallel.tensor import Placement, cut_model

# How context parallelism splits each kind of sequence that a family may have.
SPREAD: dict[str, Callable[[Any, Mesh, Parallel], None]] = {"tokens": spread_sequence, "grid": spread_grid}


def build_stages(cfg: Model, shape: Shape, parallel: Parallel, pp_rank: int) -> list[Family]:
    """The meta modules of one pipeline rank, in stage order; the whole model without a pipeline."""
    parts = stage_parts(cfg, parallel, shape.seq_len, shape.source_len)
    mine = stages_of_rank(parallel.pp_schedule, parallel.pp, parallel.pp_virtual, pp_rank) if parallel.pp > 1 else range(len(parts))
    return [build_part(cfg, shape, parts[i]) for i in mine]


def cut_stage(stage: Family, axes: Mapping[str, Axis], cfg: Parallel) -> dict[str, Placement]:
    """The passes that split layers. Returns name → placement of this rank's part of each weight, which now has the part's shape."""
    placements = cut_model(stage, specs_of(stage), axes["tp"], cfg)
    if cfg.engine == "fsdp2":
        ranks = axes["shard"].size
        # Only hidden matrices are wide: rows of a router that start with one length are drawn whole.
        placements = {
            name: replace(p, shard_dim=even_dim(p.shape, ranks)) if p.spec.role in MATRICES else p for name, p in placements.items()
        }
    return cut_experts(stage, placements, axes, cfg) if stage.cfg.has_experts else placements


def parallelize(
    stages: list[Family],
    mesh: Mesh,
    cfg: Parallel,
    device: torch.device,
    fp8: Fp8 = "false",
    norm_kernel: NormKernel | None = None,
    rule: Rule | None = None,
    shadows: bool = False,
) -> ParallelModel:
    """Meta modules → this rank's part of them, in memory but not yet drawn.

    fp8          whether and how hidden products run in FP8
    norm_kernel  the kernel of norms, if not torch's own
    rule         the gated delta rule on whole sequences, if not our own
    shadows      keep weights that nothing gathers in the compute dtype too
    """
    weights: list[Weight] = []
    states: list[State] = []
    modules, tied_copy = [], None
    micro_batch: MicroBatchScope = lambda last: nullcontext()  # noqa: E731
    pipeline, layered, on_host = mesh["pp"].size > 1, cfg.accumulation == "layered", "parameters" in cfg.offload
    # Ranks with different samples, or different tokens of the same samples, sum the gradients of the same weights.
    copies = mesh["dp_replicate"].size * mesh["shard"].size > 1
    sharded = cfg.engine == "fsdp2" and (copies or mesh["edp"].size > 1)
    # Rows in flight to experts must not be overwritten either.
    holds = (pipeline and cfg.pp_schedule in SPLIT_BACKWARD) or mesh["ep"].size > 1
    settings = {**(KEEPS_MEMORY if holds else {}), **(OVERLAP if cfg.tp_async else {})}
    backend = counting_backend(mesh.axes.values(), settings) if mesh.size > 1 else "inductor"
    if cfg.tp_async:
        share_memory(mesh["tp"], device)
    for stage in stages:
        stage.exchanges.remembered = stages[0].exchanges.remembered
        module: nn.Module = stage
        placements = cut_stage(stage, mesh.axes, cfg)
        if rule is not None:
            call_rule(stage, rule)
        SPREAD[stage.sequence](stage, mesh, cfg)
        state_specs = states_of(stage)
        multiply_in_fp8(stage, fp8)
        if norm_kernel is not None:
            call_norm_kernel(stage, norm_kernel)
        wrap_blocks(stage, cfg.recompute, backend if cfg.compile else None, cfg.budget)
        if "activations" in cfg.offload:
            offload_block_inputs(stage, device)
        if sharded:
            from megascale.parallel.data import gather_around_blocks, prefetch, shard_model  # imports FSDP2

            # A pipeline passes a stage once per micro-batch: it is gathered once per step, or every pass would gather it again.
            reshard = False if pipeline else reshard_ranks(cfg, mesh.size)
            micro_batch = shard_model(stage, mesh, reshard, stage.shape.compute, layered, on_host, placements, cfg.dp_comm)
            # In rounds, experts run several times. Selective recomputation counts operations, also those of hooks inside a block, which
            # differ between a step's passes where weights stay gathered through all of them.
            around = cfg.compile or cfg.ep_rows is not None or (cfg.recompute == "selective" and (pipeline or layered))
            if around:
                gather_around_blocks(stage)
            if mesh["ep"].size > 1 and (cfg.recompute != "selective" or around) and not layered:
                prefetch(stage)
        allocate(stage, device, on_host)
        gather_in_fp8(stage, placements)
        if shadows:
            Shadows(stage, device)
        stage.at_step(1)
        if cfg.engine == "ddp" and copies and not pipeline:
            from megascale.parallel.data import replicate_model

            module, micro_batch = replicate_model(stage, mesh)
        modules.append(module)
        for name, parameter in stage.named_parameters():
            placement = placements[name]
            shards = mesh[placement.shard].size if is_dtensor(parameter) else 1
            parts = shards * math.prod(mesh[c.axis].size for c in placement.cuts)
            weight = Weight(name, parameter, placement, mesh.size // (parts * mesh["pp"].size))
            if name == stage.shared_weight and not stage.part.first:
                tied_copy = weight
            else:
                weights.append(weight)
        states += [State(name, spec, stage.get_buffer(name)) for name, spec in state_specs.items()]
    return ParallelModel(stages, modules, weights, states, tied_copy, mesh, micro_batch)


def allocate(stage: Family, device: torch.device, on_host: bool) -> None:
    """Memory for weights (host memory if offloaded) and buffers."""
    home = torch.device("cpu") if on_host else device

    def fresh(x: torch.Tensor) -> torch.Tensor:
        # empty_like of a plain meta tensor runs in Python and imports half of the compiler.
        return torch.empty_like(x, device=home) if is_dtensor(x) else torch.empty(x.shape, dtype=x.dtype, device=home)

    stage._apply(fresh)
    for module in stage.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
