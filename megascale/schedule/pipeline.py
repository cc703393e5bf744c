"""Pipelines on torch.distributed.pipelining: only this file knows its runtime.

torch's runtime executes our orders (orders.py) over our stages. This file adds what it lacks: bytes counted where they are sent, receive
buffers that live from their message to their use instead of for the whole run, weight gradients of split backwards queued by the linear
layers, and evaluation under every placement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward
from torch.distributed.pipelining.schedules import _add_send_recv, _add_unshard_reshard, _PipelineScheduleRuntime

from megascale.comm.collectives import all_reduce
from megascale.comm.mesh import Mesh
from megascale.config.schema import Parallel
from megascale.config.stages import SPLIT_BACKWARD, stages_of_rank
from megascale.data.loader import Batch
from megascale.model.deferred import Deferred, defer
from megascale.model.experts import Bank
from megascale.model.family import Family
from megascale.model.layers import Linear
from megascale.parallel.data import forget_reduced
from megascale.parallel.model import ParallelModel
from megascale.schedule.fsdp_roots import forget_order, param_groups, share_buffers
from megascale.schedule.orders import compute_order, forward_order
from megascale.schedule.tied import TiedEmbedding


class Pipeline:
    """A rank's stages under one schedule. The runtime is built at the first step, when the micro-batches' shape is known."""

    def __init__(self, model: ParallelModel, cfg: Parallel, device: torch.device) -> None:
        self.model, self.cfg, self.device = model, cfg, device
        self.tied = TiedEmbedding(model)
        self.numbers = stages_of_rank(cfg.pp_schedule, cfg.pp, cfg.pp_virtual, model.mesh["pp"].rank)
        share_buffers(model.stages)
        self.queues = deferred_gradients(model.stages, cfg.pp_schedule)
        self.runtimes: dict[tuple[int, torch.Size], Runtime] = {}

    def run(self, batches: Sequence[Batch], scale: float) -> Tensor:
        self.model.mesh.traffic.micro_batch()  # stages work on different micro-batches at once, so a step cannot be interrupted
        self.tied.broadcast_value()
        total = self._runtime(batches).step(batches, scale, "train")
        if self.cfg.engine == "ddp":
            self._sum_replicas()
        self.tied.reduce_grad()
        self.model.finish_gradients()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        self.model.mesh.traffic.micro_batch()
        self.tied.broadcast_value()
        return self._runtime(batches).step(batches, 1.0, "evaluate")

    def _runtime(self, batches: Sequence[Batch]) -> Runtime:
        key = len(batches), batches[0].tokens.shape
        if key not in self.runtimes:
            # Messages have the size of the first micro-batch, and a shorter one would go unnoticed.
            self.runtimes[key] = Runtime(
                self.model, self.numbers, self.queues, self.cfg, len(batches), batches[0].tokens.shape, self.device
            )
        assert all(b.tokens.shape == key[1] for b in batches)
        return self.runtimes[key]

    def _sum_replicas(self) -> None:
        """Sums the gradients of plain replicas, in one message per step."""
        everyone = [*self.model.weights, *([self.model.tied_copy] if self.model.tied_copy else [])]
        grads = [g for w in everyone if (g := w.local_grad) is not None]
        if grads:
            flat = all_reduce(torch.cat([g.flatten() for g in grads]), self.model.mesh["replicas"])
            torch._foreach_copy_(grads, [part.view_as(g) for g, part in zip(grads, flat.split([g.numel() for g in grads]))])


def deferred_gradients(stages: Sequence[torch.nn.Module], schedule: str) -> list[Deferred | None]:
    """Defers the weight gradients of all products, if the schedule does: one queue per stage, whatever the number of micro-batches."""
    if schedule not in SPLIT_BACKWARD:
        return [None] * len(stages)
    queues: list[Deferred | None] = []
    for stage in stages:
        queue: Deferred = []
        for layer in stage.modules():
            if isinstance(layer, Linear | Bank):
                defer(layer, queue)
        queues.append(queue)
    return queues


class Runtime:
    """torch's runtime over this rank's stages, for one number and shape of micro-batches."""

    def __init__(
        self,
        model: ParallelModel,
        numbers: list[int],
        queues: list[Deferred | None],
        cfg: Parallel,
        m: int,
        tokens: torch.Size,
        device: torch.device,
    ) -> None:
        order = compute_order(cfg.pp_schedule, cfg.pp, cfg.pp_virtual, m, cfg.ep_overlap)
        total = cfg.pp * len(numbers)
        self.stages = [Stage(model, *stage, total, tokens, device, cfg.pp_reduce_every) for stage in zip(model.stages, numbers, queues)]
        self.device, self.has_head = device, any(s.is_last for s in self.stages)
        self.engine = _PipelineScheduleRuntime(self.stages, m, loss_fn=_already_loss, scale_grads=False)
        self.engine._prepare_schedule_with_comms(order)
        if cfg.ep_overlap:
            from megascale.schedule.overlap import overlap_pairs  # asks torch for more of its runtime

            overlap_pairs(self.engine, model.mesh.traffic, device)
        # torch's check of an order requires backward passes, and evaluation has none.
        rank_of_stage = self.engine.stage_index_to_group_rank
        forwards = {r: _add_unshard_reshard(a) for r, a in forward_order(cfg.pp_schedule, cfg.pp, cfg.pp_virtual, m).items()}
        self.orders = {
            "train": self.engine.pipeline_order_with_comms,
            "evaluate": _add_send_recv(forwards, lambda s: rank_of_stage[s], total),
        }

    def step(self, batches: Sequence[Batch], scale: float, kind: str) -> Tensor:
        for stage in self.stages:
            stage.clear_runtime_states()
            stage.batches, stage.scale = batches, scale
            stage.has_backward = True
        losses: list[Tensor] = []
        self.engine.pipeline_order_with_comms = self.orders[kind]
        self.engine._step_microbatches(target_mbs=[None] * len(batches), losses=losses)
        for stage in self.stages:
            stage.clear_runtime_states()
        if not self.has_head:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return torch.stack([loss.detach() for loss in losses]).sum()


class Stage(PipelineStage):
    """One of torch's stages whose micro-batches come from our loader and whose buffers and bytes are ours."""

    batches: Sequence[Batch]
    scale: float

    def __init__(
        self,
        model: ParallelModel,
        module: Family,
        number: int,
        queue: Deferred | None,
        total: int,
        tokens: torch.Size,
        device: torch.device,
        reduce_every: int | None,
    ) -> None:
        mesh: Mesh = model.mesh
        taken, given = (
            torch.empty(shape, dtype=module.shape.compute, device="meta", requires_grad=True) for shape in module.stream_shapes(tokens)
        )
        loss = torch.empty((), dtype=torch.promote_types(module.shape.compute, torch.float32), device="meta", requires_grad=True)
        first, last = number == 0, number == total - 1
        nothing = torch.empty(0, device="meta")
        self.queue, self.reduce_every, self.backwards = queue, reduce_every, 0
        super().__init__(
            module,
            number,
            total,
            device,
            input_args=nothing if first else taken,
            output_args=loss if last else given,
            group=mesh["pp"].group,
            dw_builder=self._take_queue if queue is not None else None,
        )
        self.axis = mesh["pp"]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.micro_batch = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Tensor:
        b, stream = self.batches[self.micro_batch], args[0] if args else None
        y: Tensor = self.submod(**b.inputs(), scale=self.scale, stream=stream)
        forget_order(self.submod)
        return y

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        return self._without_buffers(super()._prepare_forward_infra, *args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        return self._without_buffers(super()._prepare_backward_infra, *args, **kwargs)

    def _without_buffers(self, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """torch would allocate the buffers of all micro-batches at once here, and keep them: more than 1F1B saves."""
        self.device, device = torch.device("meta"), self.device
        try:
            return prepare(*args, **kwargs)
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward and not self.is_last:
            self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._counted(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._counted(super().get_bwd_send_ops(bwd_chunk_id))

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        # Both messages of this micro-batch have been used; autograd keeps what a weight pass still needs.
        for info in (*self.args_recv_info[bwd_chunk_id], *self.grad_recv_info.get(bwd_chunk_id, ())):
            info.buffer = None

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False) -> Any:
        """torch's own never reduces here, but once at the end of a step."""
        self.backwards += 1
        if self.reduce_every is None or self.backwards % self.reduce_every or not isinstance(self.submod, FSDPModule):
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        self.submod.set_is_last_backward(False)
        self.submod.set_reshard_after_backward(False)  # the stage stays gathered for the next micro-batch
        self.submod.set_requires_gradient_sync(True)
        self.submod.set_requires_all_reduce(self.backwards == len(self.batches))  # replicas are summed once
        given = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"]
        found = stage_backward(*given)
        forget_reduced(self.submod)
        return found, None

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if isinstance(self.submod, FSDPModule):
            self.submod.set_requires_all_reduce(True)
        super().perform_reduce_grad(grad_scale_factor)

    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        self.backwards = 0
        for infos in self.args_recv_info.values():
            for info in infos:
                info.buffer = None

    def _allocate(self, infos: Any) -> None:
        for info in infos:
            if not info.is_root_arg:
                info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=self.device)

    def _counted(self, operations: list[dist.P2POp]) -> list[dist.P2POp]:
        for operation in operations:
            # A message must be dense; a stage's output may be a view.
            operation.tensor = operation.tensor.contiguous()
            self.axis.traffic.add("pp", "send", operation.tensor.nbytes)
        return operations

    def _take_queue(self) -> Callable[..., None]:
        assert self.queue is not None
        taken = self.queue[:]
        self.queue.clear()

        def weight_pass() -> None:
            for add_gradient in taken:
                add_gradient()
            _keep_sums_exact(self.submod)

        return weight_pass


def _keep_sums_exact(module: torch.nn.Module) -> None:
    """Moves fresh weight gradients into FSDP's sums in the reduce dtype: its own hooks ran before the weight pass."""
    for group in param_groups(module):
        for parameter in group.fsdp_params:
            parameter.accumulate_unsharded_grad_if_needed()
            parameter.to_accumulated_grad_if_needed()


def _already_loss(output: Tensor, _: Any) -> Tensor:
    """The last stage returns its loss: head and cross-entropy are one operation."""
    return output
