"""megatron-core's tensor-parallel layers and cross-entropy as oracles of ours, on two ranks."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megascale.comm.mesh import build_mesh
from megascale.config.layout import axis_sizes
from megascale.config.schema import Parallel
from megascale.model.loss import cross_entropy_sum
from tests.layouts import Case, build, tiny
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None,
        reason="megatron-core is not installed: pip install 'megascale[megatron]'",
    ),
]


def megatron(ranks: int) -> Any:
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(ranks)
    return tensor_parallel


def both_losses() -> list[Tensor]:
    """The sum of losses and the gradient of this rank's logits: Megatron's, ours (ours through a head that is the identity)."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    theirs = megatron(ranks)
    torch.manual_seed(0)
    logits, targets = torch.randn(12, 20), torch.randint(0, 20, (12,))
    part = logits.chunk(ranks, 1)[rank].clone().requires_grad_()
    loss = theirs.vocab_parallel_cross_entropy(part[:, None].clone(), targets[:, None]).sum()  # it works in place
    loss.backward()
    axis = build_mesh(axis_sizes(Parallel(tp=ranks, dp_shard=1), ranks), "cpu")["tp"]
    weight = torch.eye(20).chunk(ranks)[rank].clone()
    x = logits.clone().requires_grad_()
    ours = cross_entropy_sum(x, weight, targets, 1.0, rank * 20 // ranks, 20, axis)
    ours.backward()
    assert x.grad is not None and part.grad is not None
    return [loss.detach(), ours.detach(), part.grad, x.grad.chunk(ranks, 1)[rank]]


def test_cross_entropy_over_a_cut_vocabulary() -> None:
    """Catches a maximum, a denominator or a target taken of one part of the vocabulary."""
    for theirs, ours, their_grad, our_grad in run_ranks(2, both_losses):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-6, atol=1e-6)


def both_sublayers() -> list[tuple[str, Tensor, Tensor]]:
    """(what, Megatron's, ours) of a feed-forward sublayer cut over the ranks: results and gradients."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    theirs = megatron(ranks)
    from megatron.core.model_parallel_config import ModelParallelConfig

    model = build(Case(tiny(ffn="gelu"), Parallel(tp=ranks, dp_shard=1), precision="fp32"), ranks)
    ffn = model.model.get_submodule("blocks.0.ffn")
    config = ModelParallelConfig(tensor_model_parallel_size=ranks, use_cpu_initialization=True)
    options: dict[str, Any] = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False, "skip_bias_add": False}
    up = theirs.ColumnParallelLinear(24, 32, gather_output=False, **options)
    down = theirs.RowParallelLinear(32, 24, input_is_parallel=True, **options)
    with torch.no_grad():
        up.weight.copy_(ffn.up.weight)
        down.weight.copy_(ffn.down.weight)
    torch.manual_seed(0)
    x = torch.randn(2, 12, 24)
    found = []
    for name, function, weights in (
        ("theirs", lambda t: down(torch.nn.functional.gelu(up(t)[0]))[0], (up.weight, down.weight)),
        ("ours", ffn, (ffn.up.weight, ffn.down.weight)),
    ):
        t = x.clone().requires_grad_()
        y = function(t)
        y.square().sum().backward()
        found.append([y.detach(), t.grad, *(w.grad for w in weights)])
        assert weights[0].shape == (32 // ranks, 24), (name, rank)
    return list(zip(("result", "input", "up", "down"), *found))


def test_products_cut_over_ranks() -> None:
    """Catches a sum that is missing forward or backward, or taken twice."""
    for rank in run_ranks(2, both_sublayers):
        for what, theirs, ours in rank:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=what)
