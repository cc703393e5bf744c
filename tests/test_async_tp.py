"""Asynchronous tensor parallelism: the compiler joins exchanges with products, and results stay the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
import torch.distributed as dist
from torch import Tensor

from megascale.comm.collectives import gather_parts, scatter_sum
from megascale.comm.functional import OVERLAP, counting_backend, share_memory
from megascale.comm.mesh import Axis, build_mesh
from megascale.config.layout import axis_sizes
from megascale.config.schema import Parallel
from megascale.errors import UsageError
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist


def sublayer(x: Tensor, up: Tensor, down: Tensor, axis: Axis) -> Tensor:
    return scatter_sum(torch.nn.functional.linear(torch.relu(torch.nn.functional.linear(gather_parts(x, axis, 1), up)), down), axis, 1)


def joined(batch: int) -> tuple[Counter[str], float, bool]:
    """The products joined with exchanges, forward and backward, the largest difference from eager, and whether both sent the same. The
    graphs that inductor's pass makes are run as they are; compiling them would take a minute.
    """
    from torch._inductor import compile_fx
    from torch._inductor.fx_passes import post_grad
    from torch._inductor.fx_passes.micro_pipeline_tp import micro_pipeline_tp_pass
    from torch.distributed import _symmetric_memory

    found = Counter[str]()

    def inner(part: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
        assert inductor._micro_pipeline_tp  # set by the backend
        post_grad.view_to_reshape(part)
        micro_pipeline_tp_pass(part.graph)
        part.recompile()
        found.update(node.target.name() for node in part.graph.nodes if getattr(node.target, "namespace", "") == "symm_mem")
        return Graph(part)

    compile_fx.compile_fx_inner = inner  # type: ignore[assignment]
    dist.is_nccl_available = lambda: True  # type: ignore[assignment]  # the pass asks whether there is any use in it
    axis = build_mesh(axis_sizes(Parallel(tp=2), dist.get_world_size()), "cpu")["tp"]
    generator = torch.Generator().manual_seed(axis.rank)
    shapes = (batch, 16, 64), (128, 64), (64, 128)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    results, sent = [], []
    library = torch.library.Library("symm_mem", "IMPL")
    for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
        library.impl(name, getattr(_symmetric_memory, f"_{name}"), "CPU")
    with _symmetric_memory._test_mode():  # torch's stand-ins for kernels that need symmetric memory
        for run in (sublayer, torch.compile(sublayer, backend=counting_backend([axis], OVERLAP), dynamic=False)):
            y = run(*inputs, axis)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), inputs)])
            sent.append(axis.traffic.take())
    return found, max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*results)), sent[0] == sent[1]


class Graph:
    """What inductor's inner compiler returns; torch calls it with the inputs or with a list of them."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        self.current_callable: Any = lambda inputs: graph(*inputs)

    def __call__(self, *inputs: Any) -> Any:
        return self.current_callable(inputs[0] if isinstance(inputs[0], list) else list(inputs))


@pytest.mark.parametrize("batch", [1, 2])
def test_exchanges_join_products(batch: int) -> None:
    """Catches a gather or reduction whose form torch's pass does not know, so that nothing overlaps; and bytes that are no longer counted
    when it does.
    """
    for found, error, counted in run_ranks(2, joined, batch):
        assert found == {"symm_mem::fused_all_gather_matmul": 2, "symm_mem::fused_matmul_reduce_scatter": 2}
        assert error <= 1e-12 and counted


def test_cpus_have_no_symmetric_memory() -> None:
    """Catches a run that waits in vain for the overlap it was promised."""
    with pytest.raises(UsageError, match=r"parallel\.tp_async is true but the device is cpu"):
        share_memory(Axis("tp", 2, 0, None, None), torch.device("cpu"))  # type: ignore[arg-type]
