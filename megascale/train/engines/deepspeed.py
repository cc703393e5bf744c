"""DeepSpeed's ZeRO 1–3 with offload to host memory or NVMe, as an engine that owns reduction, clipping and update (extra).

Only this file knows DeepSpeed; it is imported if a config asks for it. Weights start as under other engines, from (seed, name), and its
state is saved and loaded in our checkpoints, so a run may change engines at a resume. Nothing is compiled: the optimizer is torch's, and
DeepSpeed's shared-memory operation is declined before it can be built. The exception is NVMe, which needs DeepSpeed's own file operation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megascale.comm.collectives import all_reduce
from megascale.comm.mesh import Axis, Mesh
from megascale.comm.piece import Piece
from megascale.config.optimizers import OPTIMIZERS
from megascale.config.schema import Config
from megascale.data.loader import Batch
from megascale.errors import UsageError
from megascale.optim.optimizer import Optimizer
from megascale.optim.optimizers import build_optimizer
from megascale.optim.rates import grouped_by_rate, rate_of
from megascale.parallel.model import ParallelModel, Weight
from megascale.train.engines.engine import Passes
from megascale.train.engines.in_backward import valid_share
from megascale.train.state import state_pieces

MOMENTS = tuple(OPTIMIZERS["adamw"].state)


class DeepSpeed:
    """The DeepSpeed engine is created at the first step, from the weights drawn or loaded by then."""

    def __init__(self, model: ParallelModel, config: Config, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self.data: Axis = model.mesh["dp_shard"]
        self.package = _import()
        self.waiting: Optimizer | None = None  # moments of a checkpoint, until the engine takes them
        self.engine: Any = None
        self.inner: Any = None

    def run(self, batches: Sequence[Batch], scale: float, lr: float) -> Tensor:
        self.model.mesh.traffic.micro_batch()  # DeepSpeed's own sums would break an interrupted step
        self._start()
        for group in self.inner.param_groups:
            group["lr"] = lr * group["factor"]
        # DeepSpeed clips right after reducing, so gradients must be final: the number of valid targets is summed before.
        valid = valid_share(batches, scale, self.model.mesh, self.device)
        total: Tensor | None = None
        for i, b in enumerate(batches):
            self.model.mesh.traffic.moved += 1
            last = i == len(batches) - 1
            self.engine.set_gradient_accumulation_boundary(last)
            loss = self.engine(**b.inputs(), scale=scale)
            # DeepSpeed averages over data ranks; our loss is a sum.
            self.engine.backward(loss * (self.data.size / valid).to(loss.dtype))
            if not last:
                self.engine.step()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def update(self, valid: Tensor, passes: Passes = torch.isfinite) -> tuple[Tensor, Tensor]:
        """DeepSpeed itself decides which steps to skip: a rule refuses `train.skip_spikes`."""
        skipped = self.engine.skipped_steps
        self.engine.step()
        finite = self.engine.skipped_steps == skipped
        norm = self.engine.get_global_grad_norm() if finite else float("nan")
        return torch.as_tensor(norm, dtype=torch.float64, device=self.device), torch.tensor(finite, device=self.device)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        self._start()
        losses = []
        for b in batches:
            self.model.mesh.traffic.micro_batch()
            losses.append(self.engine.module(**b.inputs(training=False)))
        return torch.stack(losses).to(torch.float64).sum()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """DeepSpeed keeps it: nobody asks, since it makes no average (config/rules)."""
        return {}

    def pieces(self) -> dict[str, Piece]:
        """Before the first step: live weights and moments to be loaded. After it: a copy, each weight on one of the data ranks in turn."""
        if self.engine is None:
            if self.waiting is None:
                self.waiting = build_optimizer(self.model, self.config.optim)
            return state_pieces(self.model, self.waiting.state())
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        pieces = {f"model.{s.name}": s.piece for s in self.model.states}
        for i, w in enumerate(self.model.weights):
            whole = {"model": safe_get_full_fp32_param(w.parameter)}
            whole |= {f"optim.{key}": safe_get_full_optimizer_state(w.parameter, key) for key in MOMENTS}
            for key, tensor in whole.items():
                mine = tensor if i % self.data.size == self.data.rank else tensor[:0]
                pieces[f"{key}.{w.name}"] = self.model.piece(w, mine.clone())
            pieces[f"optim.step.{w.name}"] = Piece((), (), self._steps().clone())
        return pieces

    def loaded(self, pieces: dict[str, Piece]) -> None:
        """The engine will be created from them."""

    def _steps(self) -> Tensor:
        """Number of updates so far, the same for all weights."""
        return next(iter(self.inner.state.values()))["step"]  # type: ignore[no-any-return]

    def _start(self) -> None:
        if self.engine is not None:
            return
        cfg, mesh = self.config.optim, self.model.mesh
        rates = {w.name: rate_of(w.placement.spec, cfg, self.config.model) for w in self.model.weights}
        groups = grouped_by_rate({w.name: w.parameter for w in self.model.weights}, rates, cfg.eps)
        self.inner = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas)
        for w in self.model.weights:
            # DeepSpeed sums squares over the tensor axis for weights marked so, and counts the others once.
            w.parameter.model_parallel = w.parameter.tensor_model_parallel = bool(w.placement.cuts)  # type: ignore[attr-defined]
            if w.placement.partial:
                # DeepSpeed reduces over data ranks in its own hooks, so partial sums over the tensor axis are reduced as they appear.
                w.parameter.register_hook(partial(all_reduce, axis=mesh["tp"]))
        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        self.package.comm.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        _count(self.package.comm.comm.cdb, mesh)
        if self.config.parallel.offload_dir is not None and mesh.rank == 0:
            print("DeepSpeed compiles its file operation, once per machine: this takes minutes", file=sys.stderr, flush=True)
        self.engine, *_ = self.package.initialize(
            model=self.model.module,
            optimizer=self.inner,
            config=settings(self.config),
            mpu=_Grid(mesh) if mesh["tp"].size > 1 else None,
            dist_init_required=False,
        )
        self.engine.optimizer.check_grad_overflow = True  # a step with gradients that are not finite changes nothing, in fp32 too
        self._give_moments()

    def _give_moments(self) -> None:
        """Fills the moments of the flat tensors that DeepSpeed optimizes: zeros, or a checkpoint's."""
        # Stage 3 gives its flat tensors to the optimizer only during a step.
        flat = getattr(self.engine.optimizer, "fp32_partitioned_groups_flat", None)
        for p in flat if flat is not None else [p for group in self.inner.param_groups for p in group["params"]]:
            if not self.inner.state[p]:
                self.inner.state[p] = {"step": torch.zeros(()), **{key: torch.zeros_like(p) for key in MOMENTS}}
        if self.waiting is None:
            return
        if flat is None:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()  # DeepSpeed itself does this after the first step
        state = self.waiting.state()
        steps = {float(t) for t in state["step"].values()}
        if len(steps) > 1:
            raise UsageError(
                f"parallel.engine is deepspeed, but the checkpoint's weights have had {sorted(steps)} updates: it keeps one count for "
                "all of them; continue with engine fsdp2, or start from the weights alone with checkpoint.init_from"
            )
        for s in self.inner.state.values():
            s["step"].fill_(max(steps))
        for w in self.model.weights:
            for key in MOMENTS:
                _set_moment(w, key, state[key][w.name], self.data)
        self.waiting = None


def settings(config: Config) -> dict[str, Any]:
    """Our config as a DeepSpeed config."""
    parallel, where = config.parallel, {}
    place = {"device": "nvme", "nvme_path": parallel.offload_dir} if parallel.offload_dir else {"device": "cpu"}
    if {"optimizer", "parameters"} & set(parallel.offload):
        where["offload_optimizer"] = place
    if "parameters" in parallel.offload:
        where["offload_param"] = place
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,  # boundaries are set by hand
        "gradient_clipping": config.train.clip,
        "bf16": {"enabled": config.precision.compute == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": parallel.zero_stage, "contiguous_gradients": True, **where},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class _Grid:
    """Our groups behind the interface that DeepSpeed asks for."""

    def __init__(self, mesh: Mesh) -> None:
        for theirs, axis in (("model", mesh["tp"]), ("tensor_model", mesh["tp"]), ("data", mesh["dp_shard"])):
            setattr(self, f"get_{theirs}_parallel_rank", lambda axis=axis: axis.rank)
            setattr(self, f"get_{theirs}_parallel_world_size", lambda axis=axis: axis.size)
            setattr(self, f"get_{theirs}_parallel_group", lambda axis=axis: axis.group)


def _import() -> Any:
    try:
        from deepspeed import ops
    except ImportError:
        raise UsageError("parallel.engine is deepspeed but the package is missing: pip install deepspeed, or use engine fsdp2") from None
    # Communication set-up asks this function whether it may compile an operation, which takes minutes on CPUs and whose lock, left by a
    # killed run, would hang every later one. Even the query would run a compiler.
    ops.__compatible_ops__ = {}
    import deepspeed

    return deepspeed


def _set_moment(w: Weight, key: str, value: Tensor, data: Axis) -> None:
    """Writes a whole moment into the part that DeepSpeed keeps on this rank."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    kept = getattr(w.parameter, "ds_tensor", None)
    if kept is None:
        safe_set_full_optimizer_state(w.parameter, value, key)
        return
    # Stage 3 keeps equal slices of the flattened tensor, the last one padded.
    size = kept.ds_numel
    flat = torch.zeros(size * data.size, dtype=value.dtype, device=value.device)
    flat[: value.numel()] = value.flatten()
    safe_set_local_optimizer_state(w.parameter, flat[data.rank * size : (data.rank + 1) * size], key)


def _count(backend: Any, mesh: Mesh) -> None:
    """Makes DeepSpeed's communication count its bytes by the ring's formulas, under the axis of its group."""

    def counted(name: str, whole: str, position: int, factor: int) -> None:
        send = getattr(type(backend), name).__get__(backend)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = kwargs[whole] if whole in kwargs else args[position]
            over_tp = any(x is mesh["tp"].group for x in (*args, *kwargs.values()) if isinstance(x, ProcessGroup))
            axis = mesh["tp" if over_tp else "dp_shard"]
            axis.traffic.add(axis.name, name, factor * tensor.nbytes * (axis.size - 1) // axis.size)
            return send(*args, **kwargs)

        setattr(backend, name, call)

    counted("all_reduce", "tensor", 0, 2)
    counted("reduce", "tensor", 0, 1)
    counted("all_gather_into_tensor", "output_tensor", 0, 1)
    counted("reduce_scatter_tensor", "input_tensor", 1, 1)
