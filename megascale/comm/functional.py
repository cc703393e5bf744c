"""Collectives inside compiled graphs: torch's functional ones, and how many bytes a graph sends when it runs.

A graph cannot count while it runs, but its nodes say what it sends: shapes are fixed, and recomputation is part of it. So a graph is read
once, just before it is compiled, and every call of the compiled code adds the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megascale.comm.mesh import Axis, Traffic
from megascale.errors import UsageError

ops: Any = torch.ops._c10d_functional
Sent = tuple[str, str, int]  # axis, operation, bytes


def all_reduce(x: Tensor, axis: Axis, operation: str) -> Tensor:
    """Sum or max over the axis, in new memory."""
    return ops.wait_tensor(ops.all_reduce(x, operation, _name(axis)))  # type: ignore[no-any-return]


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Equal pieces [n, …] of all ranks joined → [ranks·n, …]; x contiguous."""
    return ops.wait_tensor(ops.all_gather_into_tensor(x, axis.size, _name(axis)))  # type: ignore[no-any-return]


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """The sum over ranks of x [ranks·n, …], of which this rank keeps its piece [n, …]; x contiguous."""
    return ops.wait_tensor(ops.reduce_scatter_tensor(x, "sum", axis.size, _name(axis)))  # type: ignore[no-any-return]


def all_to_all(x: Tensor, received: Sequence[int], sent: Sequence[int], axis: Axis) -> Tensor:
    """x [n], with `sent[i]` numbers for rank i, → the numbers sent to this rank, `received[i]` of them from rank i."""
    return ops.wait_tensor(ops.all_to_all_single(x, list(received), list(sent), _name(axis)))  # type: ignore[no-any-return]


def _name(axis: Axis) -> str:
    assert axis.group is not None
    return axis.group.group_name  # type: ignore[no-any-return]


# Settings of inductor with which its pass joins gathers and reductions with the products beside them, over groups with symmetric memory.
OVERLAP: dict[str, Any] = {"_micro_pipeline_tp": True}


def counting_backend(axes: Iterable[Axis], settings: Mapping[str, Any]) -> Callable[..., Any]:
    """A torch.compile backend: inductor with some settings, whose graphs add the bytes that they send over these axes to the axes'
    traffic.
    """
    by_group = {_name(axis): axis for axis in axes if axis.group is not None}

    def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        import torch._functorch.config as functorch
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(part: torch.fx.GraphModule, examples: Sequence[Any], **options: Any) -> Any:
            sent = sent_by(part, by_group)
            compiled: Any = compile_fx_inner(part, examples, **options)
            if sent:
                traffic = next(iter(by_group.values())).traffic
                compiled.current_callable = counted(compiled.current_callable, sent, traffic)
            return compiled

        # Graphs from AOTAutograd's cache would bypass `inner` and not be counted; inductor's own cache stays.
        with functorch.patch(enable_autograd_cache=False):
            return compile_fx(graph, inputs, inner_compile=inner, config_patches=dict(settings) or None)

    return compile_graph


def share_memory(axis: Axis, device: torch.device) -> None:
    """Gives the ranks of an axis symmetric memory, through which OVERLAP works. Raises UsageError where there is none."""
    off = "set parallel.tp_async to false, which computes the same"
    if device.type != "cuda":
        raise UsageError(f"parallel.tp_async is true but the device is {device.type}: symmetric memory exists on CUDA devices only; {off}")
    import torch._inductor.config as inductor
    from torch.distributed import _symmetric_memory

    enable = getattr(_symmetric_memory, "enable_symm_mem_for_group", None)
    if enable is None or not hasattr(inductor, "_micro_pipeline_tp"):
        raise UsageError(
            f"parallel.tp_async is true but torch {torch.__version__} has no symmetric memory for it: use torch 2.13, or {off}"
        )
    enable(_name(axis))


def sent_by(graph: torch.fx.GraphModule, axes: dict[str, Axis]) -> list[Sent]:
    """What one call of a graph sends, in order; `axes` by the names of their groups."""
    found = []
    for node in graph.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "namespace", "") != "_c10d_functional":
            continue
        name = node.target.name().partition("::")[2]
        if name == "wait_tensor":
            continue
        axis = axes[node.args[-1]]
        found.append((axis.name, *_bytes_of(name, node, axis)))
    return found


def _bytes_of(name: str, node: torch.fx.Node, axis: Axis) -> tuple[str, int]:
    """(operation, bytes), counted as in comm/collectives.py."""
    out = node.meta["val"]
    match name:
        case "all_reduce" | "all_reduce_":
            return "all_reduce", 2 * out.nbytes * (axis.size - 1) // axis.size
        case "all_gather_into_tensor":
            return "all_gather", out.nbytes // axis.size * (axis.size - 1)
        case "reduce_scatter_tensor":
            return "reduce_scatter", out.nbytes * (axis.size - 1)
        case "all_to_all_single":
            sent = node.args[2]
            assert isinstance(sent, list)
            return "all_to_all", (sum(sent) - sent[axis.rank]) * out.element_size()
    raise NotImplementedError(f"{name} in a compiled graph, which nothing here sends")


def counted(run: Callable[[Any], Any], sent: Sequence[Sent], traffic: Traffic) -> Callable[[Any], Any]:
    """`run`, which first counts what it is about to send."""

    def call(inputs: Any) -> Any:
        for axis, operation, size in sent:
            traffic.add(axis, operation, size)
        return run(inputs)

    return call
