"""Data parallelism with torch's own engines, configured so that gradients are plain sums and every byte is counted.

FSDP2 and DDP average by default; our loss is a sum over the global batch that is divided once, so both are set to sum. Their traffic does
not pass through our collectives, hence the counting hooks.
"""

# No `from __future__ import annotations` here: DDP reads the real annotations of a communication hook.

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from megascale.comm.collectives import gather_into, scatter_into
from megascale.comm.mesh import Axis, Mesh
from megascale.errors import UsageError
from megascale.model.family import Family
from megascale.parallel.expert import banks
from megascale.parallel.model import MicroBatchScope
from megascale.parallel.tensor import Placement

# torch 2.13 renamed it and warns about the old name, the only one in 2.11 and 2.12.
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in signature(DistributedDataParallel).parameters else "broadcast_buffers"


def shard_model(
    model: Family,
    mesh: Mesh,
    reshard_after_forward: bool | int,
    compute: torch.dtype,
    one_group: bool,
    on_host: bool,
    placements: Mapping[str, Placement],
    comm: str = "shared",
) -> MicroBatchScope:
    """FSDP2 over dp_shard and cp together, replicated over dp_replicate (HSDP) if that is larger than one.

    One group per block, one for final norm and head, and one for the root: the embedding, and a head tied to it. The last two stay gathered
    from forward to backward; final norm and head are reduced first in the backward pass, overlapping the blocks, and the root last.
    `one_group` puts the single layer of a stage into the root's. Stored weights are the masters; they are gathered in the compute dtype and
    gradients are reduced in the stored one, or in the shape's `reduce`. `on_host` keeps shards and their gradients in host memory. Experts
    with their own axes form groups over edp; if there is nothing to shard or sum, they are plain weights. `comm`: parallel.dp_comm.
    """
    assert mesh.device_mesh is not None
    reduce = model.shape.reduce or model.shape.storage
    mixed = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=mesh.device_mesh.device_type == "cuda") if on_host else OffloadPolicy()
    replicate = mesh["dp_replicate"]
    dims = {p: placements[name].shard_dim for name, p in model.named_parameters()}
    alone: set[nn.Parameter] = set()
    device = mesh.device_mesh.device_type
    grids: dict[tuple[int, tuple[str, ...]], DeviceMesh] = {}

    def shard(modules: list[nn.Module], axis: Axis, grid: DeviceMesh, reshard: bool | int) -> None:
        names = ("dp_replicate", axis.name) if replicate.size > 1 else (axis.name,)
        if (id(grid), names) not in grids:
            grids[id(grid), names] = grid[names]  # a view of its own for every layer would cost the host
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=grids[id(grid), names],
            reshard_after_forward=reshard,
            mp_policy=mixed,
            offload_policy=place,
            shard_placement_fn=lambda p: Shard(dims[p]),
            ignored_params=alone,
        )
        module = modules[0]
        assert isinstance(module, FSDPModule)
        # These do not recurse.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if axis.size > 1:
            gather, scatter = symmetric(module, device) if comm == "symmetric" else (None, None)
            module.set_custom_all_gather(CountingAllGather(axis, gather))
            module.set_custom_reduce_scatter(CountingReduceScatter(axis, scatter))
        if replicate.size > 1:
            module.set_all_reduce_hook(_count_all_reduce(replicate))

    if mesh.expert_mesh is not None:
        for bank in banks(model):
            if mesh["edp"].size * replicate.size > 1:
                # A number of ranks speaks of the axis of the other weights.
                shard([bank], mesh["edp"], mesh.expert_mesh, bool(reshard_after_forward) and not one_group)
            else:
                alone.update(bank.parameters())
    blocks: list[nn.Module] = [] if one_group else [block for _, block in model.units()]
    for block in blocks:
        shard([block], mesh["shard"], mesh.device_mesh, reshard_after_forward)
    if model.tail and not one_group:
        shard(model.tail, mesh["shard"], mesh.device_mesh, False)
    shard([model], mesh["shard"], mesh.device_mesh, False)
    if comm == "separate":
        asked_of(model, "set_separate_reduce_scatter_group", comm)(True)
        # Gradients of a second group are copied while those of the first are still on their way.
        asked_of(model, "set_reduce_scatter_max_input_buffers", comm)(2)

    @contextmanager
    def scope(last: bool) -> Iterator[None]:
        forget_reduced(model)
        # Replicas are summed once per step, after the last micro-batch; until then each keeps the sums of its own shard group.
        model.set_requires_all_reduce(last)  # type: ignore[operator]
        model.set_is_last_backward(last)  # type: ignore[operator]
        yield

    return scope


def forget_reduced(model: nn.Module) -> None:
    """Frees the unsharded gradient that FSDP2 reduced last, that of the embedding, which it would keep through the next micro-batch's
    forward pass: 2.1 GB for a vocabulary of 128k and a width of 4096. Its memory is used again once the reduction has read it.
    """
    assert isinstance(model, FSDPModule)
    context: Any = getattr(model._get_fsdp_state(), "_comm_ctx", None)
    states = getattr(context, "reduce_scatter_states", [])  # another torch may keep them elsewhere
    for state in states:
        if state.reduce_scatter_input.is_cuda:
            state.reduce_scatter_input.record_stream(context.reduce_scatter_stream)
    states.clear()


def forget_gathered(stages: Iterable[nn.Module]) -> None:
    """Frees weights that are gathered, so that the next forward pass gathers them from the shards as they are then."""
    for group in (m for stage in stages for m in stage.modules() if isinstance(m, FSDPModule)):
        group.reshard()


def asked_of(module: nn.Module | FSDPModule, method: str, comm: str) -> Callable[..., None]:
    """A method of FSDP2's that not every torch has."""
    found: Callable[..., None] | None = getattr(module, method, None)
    if found is None:
        raise UsageError(f"parallel.dp_comm is {comm} but FSDP2 of torch {torch.__version__} has no {method}: use torch 2.13, or shared")
    return found


def symmetric(module: FSDPModule, device: str) -> tuple[Any, Any]:
    """FSDP2's gather and reduce-scatter from symmetric memory."""
    if device != "cuda":
        raise UsageError(
            f"parallel.dp_comm is symmetric but the device is {device}: NCCL's symmetric memory exists on CUDA only; use shared"
        )
    asked_of(module, "set_symm_mem_for_comm", "symmetric")()
    (group,) = module._get_fsdp_state()._fsdp_param_groups
    return group._all_gather_comm, group._reduce_scatter_comm


def prefetch(model: Family) -> None:
    """Gathers the next block and its experts while the current block computes. FSDP2 does that by itself if the host runs ahead of the
    device. A mixture makes the host wait for its row counts, so the experts' weights would be requested only afterwards.

    Not with selective recomputation: it requires the same operations inside a block in forward and in recomputation, gathers included.
    """

    def groups(module: nn.Module) -> list[FSDPModule]:
        return [m for m in (module, *banks(module)) if isinstance(m, FSDPModule)]

    modules: list[nn.Module] = [model, *(block for _, block in model.units())]
    for before, after in pairwise(modules):
        groups(before)[0].set_modules_to_forward_prefetch(groups(after))
    for after, before in pairwise(reversed(modules[1:])):
        groups(after)[0].set_modules_to_backward_prefetch(groups(before))


def gather_around_blocks(model: Family) -> None:
    """Gathers the weights of experts when their block begins and frees them when it ends: compiled, a block is one graph, and torch's hooks
    on its experts would break it. They keep their own groups.
    """
    for _, block in model.units():
        for bank in banks(block):
            if not isinstance(bank, FSDPModule):
                continue
            state: Any = bank._get_fsdp_state()
            hooks: list[Any] = [getattr(state, f"_{when}_forward_hook_handle", None) for when in ("pre", "post")]
            if None in hooks:
                logging.getLogger(__name__).warning(
                    f"torch {torch.__version__} keeps FSDP2's hooks elsewhere: experts break their block's graph"
                )
                return
            for hook in hooks:
                hook.remove()
            # Within the block's own hooks.
            state._pre_forward_hook_handle = block.register_forward_pre_hook(state._pre_forward, with_kwargs=True)
            state._post_forward_hook_handle = block.register_forward_hook(state._post_forward, prepend=True)


def replicate_model(model: Family, mesh: Mesh) -> tuple[nn.Module, MicroBatchScope]:
    """DDP over dp_replicate and cp together: gradients summed once per step in buckets that overlap with backward."""
    axis = mesh["replicas"]
    # Buffers are equal on all ranks by construction; DDP would broadcast rank 0's before every forward.
    quiet: dict[str, Any] = {"init_sync": False, BUFFERS: False}
    wrapped = DistributedDataParallel(model, process_group=axis.group, gradient_as_bucket_view=True, **quiet)
    wrapped.register_comm_hook(axis, _summing_hook)
    return wrapped, lambda last: nullcontext() if last else wrapped.no_sync()


class CountingAllGather(AllGather):
    """FSDP2's all-gather, or `inner`, with its bytes counted."""

    def __init__(self, axis: Axis, inner: AllGather | None = None) -> None:
        self.axis, self.inner = axis, inner

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.inner is not None:
            return self.inner.allocate(size, dtype=dtype, device=device)
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> dist.Work | None:
        # Where weights were kept on some ranks between forward and backward, the group is those.
        self.axis.traffic.add(self.axis.name, "all_gather", input_tensor.nbytes * (group.size() - 1))
        if self.inner is not None:
            return self.inner(output_tensor, input_tensor, group, async_op)
        return gather_into(  # type: ignore[no-any-return]
            output_tensor, input_tensor, group=group, async_op=async_op
        )


class CountingReduceScatter(ReduceScatter):
    """FSDP2's reduce-scatter, or `inner`, with its bytes counted."""

    def __init__(self, axis: Axis, inner: ReduceScatter | None = None) -> None:
        self.axis, self.inner = axis, inner

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.inner is not None:
            return self.inner.allocate(size, dtype=dtype, device=device)
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        self.axis.traffic.add(self.axis.name, "reduce_scatter", output_tensor.nbytes * (self.axis.size - 1))
        if self.inner is not None:
            return self.inner(output_tensor, input_tensor, group, op, async_op)
        return scatter_into(  # type: ignore[no-any-return]
            output_tensor, input_tensor, op=op, group=group, async_op=async_op
        )


def _count_all_reduce(axis: Axis) -> Callable[[Tensor], None]:
    """A hook that FSDP2 calls with the result of HSDP's all-reduce."""

    def hook(reduced: Tensor) -> None:
        axis.traffic.add(axis.name, "all_reduce", 2 * reduced.nbytes * (axis.size - 1) // axis.size)

    return hook


def _summing_hook(axis: Axis, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    buffer = bucket.buffer()
    axis.traffic.add(axis.name, "all_reduce", 2 * buffer.nbytes * (axis.size - 1) // axis.size)
    work = dist.all_reduce(buffer, group=axis.group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
