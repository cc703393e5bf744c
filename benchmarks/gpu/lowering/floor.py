"""The fewest bytes that a graph's own kernels could move, between the library calls that it makes.

A kernel can do everything that lies between the same calls: it reads each of its inputs once, writes what a later call or the caller
needs, and computes everything else again wherever it is used. Each such result may be computed as early as its inputs are there or as late
as it is needed; the floor takes what is best for each, so no order of kernels moves less. Products and attention are as they are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten
CALLS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_mm.default,
    aten._grouped_mm.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_cudnn_attention_backward.default,
    # What experts add: the choice, the order of rows by expert, and the sum of a token's rows.
    aten.topk.default,
    aten.sort.stable,
    aten._embedding_bag.default,
    aten._embedding_bag_forward_only.default,
    aten._embedding_bag_per_sample_weights_backward.default,
}
OWN = "megascale"  # this project's operators are products, too
VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.alias.default,
    aten.detach.default,
}


@dataclass
class Floor:
    """Bytes: `fused`, the fewest of the fused kernels; `calls`, of the library calls; `casts`, of copies of weights in another dtype."""

    fused: int
    calls: int
    casts: int


def floor_of(graph: torch.fx.Graph) -> Floor:
    """The floor of a lowered graph, whose nodes have their tensors as meta["val"]."""
    base, calls, casts = _bases(graph), 0, 0
    results: dict[Node, None] = {}  # of own kernels, needed by calls or the caller
    for node in graph.nodes:
        if node.op == "output" or is_call(node):
            results |= dict.fromkeys(n for n in map(base.__getitem__, node.all_input_nodes) if _computed(n))
            if node.op != "output":
                calls += sum(size(n) for n in dict.fromkeys(node.all_input_nodes)) + size(node)
        elif node.target is torch.ops.prims.convert_element_type.default and any(map(is_call, _users(node))):
            source = base[node.all_input_nodes[0]]
            casts += size(source) + size(node) if source.op == "placeholder" else 0
    early, late = _levels(graph)
    level = {n: early[n] for n in results}
    best = _moved(level, base)
    for _ in range(3):
        for n in results:
            costs = {at: _moved(level | {n: at}, base) for at in range(early[n], late[n] + 1)}
            level[n] = min(costs, key=lambda at: costs[at])
        now = _moved(level, base)
        if now == best:
            break
        best = now
    return Floor(best, calls, casts)


def _moved(level: dict[Node, int], base: dict[Node, Node]) -> int:
    """Bytes of one kernel for each level, which makes the results of that level."""
    taken: dict[int, set[Node]] = {}
    for result, at in level.items():
        taken.setdefault(at, set()).update(_sources(result, at, level, base, {}))
    return sum(size(n) for n in level) + sum(size(n) for each in taken.values() for n in each)


def _sources(node: Node, at: int, level: dict[Node, int], base: dict[Node, Node], known: dict[Node, frozenset[Node]]) -> frozenset[Node]:
    """What a kernel at this level reads to make `node`."""
    if node not in known:
        found: set[Node] = set()
        for n in map(base.__getitem__, node.all_input_nodes):
            if not _computed(n):
                found.add(n)
                continue
            again = _sources(n, at, level, base, known)
            there = n in level and level[n] < at and size(n) <= sum(map(size, again))
            found |= {n} if there else again
        known[node] = frozenset(found)
    return known[node]


def is_call(node: Node) -> bool:
    if node.target is aten.scatter_add.default:  # of integers: CUDA has no such atomic sum, so torch's kernel does it
        return not node.meta["val"].is_floating_point()
    return node.op == "call_function" and (node.target in CALLS or getattr(node.target, "namespace", "") == OWN)


def size(node: Node) -> int:
    """Bytes of a node's tensors; of an expanded one, those that are there."""
    found: Any = node.meta.get("val")
    return sum(_bytes(x) for x in (found if isinstance(found, tuple | list) else (found,)) if isinstance(x, Tensor))


def _bytes(x: Tensor) -> int:
    elements = 1
    for length, stride in zip(x.shape, x.stride()):
        elements *= length if stride else 1
    return elements * x.element_size()


def _computed(node: Node) -> bool:
    """Whether a kernel of the graph's own makes it: not an input, a call, a part of a call's result, or a number."""
    if node.op != "call_function" or is_call(node):
        return False
    if _is_view(node):
        return _computed(node.all_input_nodes[0])
    if node.target is operator.getitem:
        return _computed(node.args[0])  # type: ignore[arg-type]
    return True


def _is_view(node: Node) -> bool:
    return node.op == "call_function" and node.target in VIEWS


def _bases(graph: torch.fx.Graph) -> dict[Node, Node]:
    """Each node's own memory: itself, or what it is a view of."""
    found: dict[Node, Node] = {}
    for node in graph.nodes:
        found[node] = found[node.all_input_nodes[0]] if _is_view(node) else node
    return found


def _users(node: Node) -> list[Node]:
    """The nodes that use it, through views."""
    found: list[Node] = []
    for user in node.users:
        found += _users(user) if _is_view(user) else [user]
    return found


def _levels(graph: torch.fx.Graph) -> tuple[dict[Node, int], dict[Node, int]]:
    """For each node the calls before it: the fewest, and the most that leave the rest its order."""
    early: dict[Node, int] = {}
    late: dict[Node, int] = {}
    for node in graph.nodes:
        early[node] = max((early[n] for n in node.all_input_nodes), default=0) + is_call(node)
    last = max(early.values())
    for node in reversed(graph.nodes):
        late[node] = min((late[n] - is_call(n) for n in node.users), default=last)
    return early, late
