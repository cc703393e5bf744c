"""A model on its mesh and the engine that trains it, from a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megascale.comm.mesh import Mesh, build_mesh
from megascale.config.layout import axis_sizes
from megascale.config.schema import Config, Parallel
from megascale.errors import UsageError
from megascale.launch.ranks import node_name
from megascale.measure.compute import flops_per_token
from megascale.model.families import build_part
from megascale.model.ops.delta_kernel import Rule, choose_rule
from megascale.model.ops.matmul import way_of
from megascale.model.ops.norm_kernels import NormKernel, choose_kernels
from megascale.model.shape import shape_of
from megascale.model.spec import active_parameters, specs_of
from megascale.optim.clip import norm_factors
from megascale.optim.masters import immovable_note
from megascale.optim.optimizers import build_optimizer
from megascale.optim.rates import check_names
from megascale.parallel.apply import build_stages, parallelize
from megascale.parallel.deepep import buffer_class
from megascale.parallel.model import ParallelModel
from megascale.parallel.precision import products_of
from megascale.precision.dynamic import check_torchao
from megascale.schedule.accumulate import Accumulation, Schedule
from megascale.train.attention_kernels import attention_kernels
from megascale.train.engines.engine import Engine, Native
from megascale.train.gpu import gpu_facts


def check_torch(config: Config) -> None:
    """Refuses pipelines on torch before 2.12, whose pipeline stages had another interface, and packages that are missing."""
    if config.parallel.ep_kernels == "deepep":
        buffer_class()
    if config.precision.fp8 == "dynamic":
        check_torchao()
    if config.parallel.pp > 1 and torch.__version__.startswith("2.11."):
        raise UsageError(f"parallel.pp is {config.parallel.pp} but torch is {torch.__version__}: pipelines need torch 2.12, or set pp to 1")


def check_offload_dir(config: Config) -> None:
    """Raises UsageError if the folder for offloaded state is missing on any node."""
    folder = config.parallel.offload_dir
    if folder is not None and not Path(folder).is_dir():
        raise UsageError(f"parallel.offload_dir is {folder}, but {node_name()} has no such folder: create it on every node")


def build_model(
    config: Config, mesh: Mesh, device: torch.device, documents: Sequence[int] = ()
) -> tuple[ParallelModel, dict[str, Any], float]:
    """The parallelized model in memory, facts for the log, and training FLOPs per token; `documents` as in `keys_met`."""
    kernels = choose_kernels(config.run.kernels, config.model.norm, device)
    shape = shape_of(config)
    specs = specs_of(build_part(config.model, shape))
    check_names(config.optim, specs)
    flops = flops_per_token(config.model, specs, config.train.seq_len, config.train.source_length, documents)
    active = active_parameters(specs)
    facts = {
        "parameters": sum(s.numel for s in specs.values()),
        "parameters_active": active,
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        **gpu_facts(device),
        "attention_kernels": attention_kernels(config, device),
        "norm_kernel": f"{kernels.source} ({kernels.reason})",
        **({"threads": torch.get_num_threads(), "products": way_of(shape.compute)} if device.type == "cpu" else {}),
    }
    if (chosen := rule_of(config, device)) is not None:
        facts["delta_kernel"] = chosen[1]
    note = immovable_note(config, specs)
    if note is not None:
        facts["immovable"] = note
    return _assemble(config, mesh, device, kernels.norm), facts, flops


def place_model(config: Config, ranks: int, device: torch.device) -> ParallelModel:
    """The model of a config on a mesh over all `ranks`, in memory but not drawn."""
    mesh = build_mesh(axis_sizes(config.parallel, ranks), device.type, config.parallel.heads_over)
    return _assemble(config, mesh, device, choose_kernels(config.run.kernels, config.model.norm, device).norm)


def draw_model(config: Config, ranks: int, device: torch.device) -> ParallelModel:
    """`place_model` with its weights drawn: for tests and benchmarks."""
    model = place_model(config, ranks, device)
    for _ in model.draw_weights(config.run.seed):
        pass
    return model


def _assemble(config: Config, mesh: Mesh, device: torch.device, norm: NormKernel) -> ParallelModel:
    stages = build_stages(config.model, shape_of(config), config.parallel, mesh["pp"].rank)
    rule = rule_of(config, device)
    own = None if rule is None else rule[0]
    return parallelize(stages, mesh, config.parallel, device, products_of(config.precision), norm, own, config.shadows)


def rule_of(config: Config, device: torch.device) -> tuple[Rule, str] | None:
    """The implementation of the gated delta rule with the reason for it; None for models without."""
    widths = [m.delta.key_dim for m in config.model.variants.values() if m.delta is not None]
    return choose_rule(config.run.kernels, max(widths), shape_of(config).compute, device) if widths else None


def build_schedule(model: ParallelModel, parallel: Parallel, device: torch.device) -> Schedule:
    """Builds the schedule. Each imports what it needs here, so a rank's start pays only for the one it runs."""
    if parallel.pp > 1:
        from megascale.schedule.pipeline import Pipeline

        return Pipeline(model, parallel, device)
    if parallel.accumulation == "layered":
        from megascale.schedule.layered import Layered

        return Layered(model, parallel.breadth_first)
    return Accumulation(model)


def build_engine(model: ParallelModel, config: Config, device: torch.device) -> Engine:
    if config.parallel.engine == "deepspeed":
        from megascale.train.engines.deepspeed import DeepSpeed  # an optional package

        return DeepSpeed(model, config, device)
    schedule = build_schedule(model, config.parallel, device)
    tokens = config.train.global_batch_size * config.train.seq_len
    if config.parallel.update_in_backward:
        from megascale.schedule.layered import Layered
        from megascale.train.engines.in_backward import InBackward

        assert isinstance(schedule, Layered)
        return InBackward(model, schedule, config.optim, device, tokens)
    optimizer = build_optimizer(model, config.optim, config.parallel.offload, tokens)
    return Native(model, schedule, optimizer, config.train.clip, factors=norm_factors(model.weights, config.optim))
