"""A few training steps on one rank, and what of them is compared: losses, norms, whole gradients and weights."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from megascale.comm.collectives import all_gather
from megascale.comm.mesh import Mesh
from megascale.config.schema import Config
from megascale.data.loader import sample_numbers
from megascale.parallel.model import ParallelModel, Weight
from megascale.train.engines.engine import Engine, backward, update
from megascale.verify.samples import random_batch


def run_steps(
    config: Config,
    model: ParallelModel,
    engine: Engine,
    scale: float,
    tensors: bool = True,
    packed: bool | None = None,
    start: bool = False,
) -> dict[str, Any]:
    """`train.steps` steps on random samples through the functions that a run uses. Collective.

    loss, norm       by step
    samples          by step, the numbers of this rank's samples
    start            weights before the first step, if asked for
    grad             gradients of the first step, with `tensors`
    weight           weights after the last step, with `tensors`
    sent, calls      bytes and collectives of the last step, by axis
    """
    train, mesh = config.train, model.mesh
    result: dict[str, Any] = {"loss": [], "norm": [], "samples": []}
    if start:
        result["start"] = whole(model, "local")
    for step in range(train.total_steps):
        rows = sample_numbers(
            step * train.global_batch_size, train.global_batch_size, train.micro_batch_size, mesh.data_rank, mesh.data_size
        )
        batches = [random_batch(config, row, packed) for row in rows]
        result["samples"].append([n for row in rows for n in row])
        mesh.traffic.take()
        sums = backward(engine, batches, scale, config.optim.lr)
        result["sent"], result["calls"] = mesh.traffic.take()
        if step == 0 and tensors:
            result["grad"] = whole(model, "local_grad")
        done = update(engine, sums)
        result["loss"].append(done.loss.item())
        result["norm"].append(done.norm.item())
    if tensors:
        result["weight"] = whole(model, "local")
    return result


def gather_whole(local: Tensor, w: Weight, mesh: Mesh) -> Tensor:
    """A tensor shaped like the weight's local part → the unsharded one, on every rank."""
    placement = w.placement
    if w.sharded:
        axis, dim, length = mesh[placement.shard], placement.shard_dim, placement.shape[placement.shard_dim]
        padded = local.new_zeros([-(-length // axis.size) if i == dim else n for i, n in enumerate(local.shape)])
        padded.narrow(dim, 0, local.shape[dim]).copy_(local)
        local = all_gather(padded, axis, dim).narrow(dim, 0, length)
    for cut in placement.cuts:
        local = all_gather(local, mesh[cut.axis], cut.dim)
    return local


def whole(model: ParallelModel, of: str) -> dict[str, Tensor]:
    """Every weight ("local") or gradient ("local_grad") unsharded, padding cut off."""
    result = {}
    for w in model.weights:
        tensor = gather_whole(getattr(w, of), w, model.mesh)
        result[w.name] = tensor[tuple(slice(0, n) for n in w.placement.spec.shape)].clone()
    if model.mesh["pp"].size > 1:
        stages: list[dict[str, Tensor]] = [{} for _ in range(model.mesh["pp"].size)]
        dist.all_gather_object(stages, result, group=model.mesh["pp"].group)
        result = {name: tensor for stage in stages for name, tensor in stage.items()}
    return result


def worst(got: dict[str, Tensor], reference: dict[str, Tensor], allowed: dict[str, Tensor] | None = None) -> tuple[float, str]:
    """The largest max|Δ|/max|ref| of a tensor, and which one it is. Of |Δ| counts what is beyond `allowed`, entry by entry.

    A tensor that is zero but for rounding (the gradient of a key bias: softmax ignores it) has no scale of its own; a hundredth of the
    largest tensor's serves for it.
    """
    assert got.keys() == reference.keys()
    floor = 0.01 * max(r.abs().max().item() for r in reference.values())
    beyond = {n: (got[n] - r).abs() - (0.0 if allowed is None else allowed[n]) for n, r in reference.items()}
    return max((beyond[n].max().item() / max(r.abs().max().item(), floor), n) for n, r in reference.items())
