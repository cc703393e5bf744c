"""One graph through Inductor's code generator for the device of device.py: kernels, and the bytes that each moves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.lowering.floor import Floor, floor_of

GPU = torch.device("cuda", 0)


@dataclass
class Lowered:
    """A graph's kernels. `calls`: products, attention and sorts, done by libraries; `fused`: kernels that Inductor writes. Bytes are read
    and written, each operand of a kernel once.
    """

    fused: int
    calls: int
    fused_bytes: int
    floor: Floor
    source: str


def on_gpu(graph: torch.fx.GraphModule) -> tuple[torch.fx.GraphModule, Any, list[Tensor]]:
    """The graph, traced on meta tensors, with CUDA tensors that have no memory; their mode, and its inputs."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.fx.node import map_aggregate
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        with mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)

    for node in graph.graph.nodes:
        node.args = map_aggregate(node.args, _there)
        node.kwargs = map_aggregate(node.kwargs, _there)
        if node.op == "get_attr":
            setattr(graph, str(node.target), moved(getattr(graph, str(node.target))))
    inputs = [moved(node.meta["val"]) for node in graph.graph.find_nodes(op="placeholder")]
    graph.recompile()
    with torch.no_grad():
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    return graph, mode, inputs


def _there(x: Any) -> Any:
    return GPU if isinstance(x, torch.device) and x.type == "meta" else x


def lower(graph: torch.fx.GraphModule, inference: bool) -> Lowered:
    """`graph` as captured. Inductor's own order: its passes over the graph, lowering, scheduling, source."""
    from torch._inductor.compile_fx import _recursive_post_grad_passes, view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.ir import AssertScalar, MultiOutput
    from torch._inductor.virtualized import V

    view_to_reshape(graph)
    graph, mode, inputs = on_gpu(graph)
    with V.set_fake_mode(mode):
        _recursive_post_grad_passes(graph, is_inference=inference)
    lowering = GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env, is_inference=inference)
    with V.set_graph_handler(lowering), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()), V.set_extern_kernel_nodes([]):
        lowering.run(*inputs)
        code: Any = lowering.codegen()[0]
        nodes = lowering.scheduler.nodes
        parts = (MultiOutput, AssertScalar)  # a call's other results, and checks on the host: no kernels
        size = [(n.is_extern(), n.get_read_write_buffers_sizes()) for n in nodes if not isinstance(getattr(n, "node", None), parts)]
    source: str = code.value if hasattr(code, "value") else code
    return Lowered(
        fused=len(re.findall(r"async_compile\.triton\(", source)),
        calls=sum(extern for extern, _ in size),
        fused_bytes=sum(n for extern, n in size if not extern),
        floor=floor_of(graph.graph),
        source=source,
    )
