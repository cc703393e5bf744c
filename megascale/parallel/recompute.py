"""Recomputation and compilation of blocks, in place, so names and hooks do not change."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megascale.comm import exchange, functional  # noqa: F401  the first declares operators
from megascale.model.exchanges import Pass, in_turn
from megascale.model.family import Family
from megascale.model.ops import (  # noqa: F401  they declare operators
    attention_masked,
    attention_sink,
    delta_kernel,
    delta_rule,
    grouped_matmul,
    matmul_cpu,
)
from megascale.model.ops.compiled import Backend, compile_static
from megascale.model.router import Router
from megascale.parallel import delta, ring
from megascale.precision import fp8  # noqa: F401  one more

aten = torch.ops.aten
# Selective recomputation keeps the results of products and of attention, which take nearly all time: what torch's own partitioner calls
# compute-intensive, and grouped, scaled and our own products. Norms, activations and rotations are cheap to recompute, and they fill the
# memory.
# Every mode keeps which experts a router chose: if a recomputed logit differed in its last bit, a token could go to another expert than its
# gradient expects. Everything else about the assignments follows from the choice in integers.
CHOICES = {aten.topk.default}
SCALED = ("_scaled_mm", "_scaled_mm_v2", "_scaled_grouped_mm", "_scaled_grouped_mm_v2")
KEPT = CHOICES | {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,  # not baddbmm, by which the ring's tiles compute scores, that must not be kept
    aten._grouped_mm.default,
    aten._flash_attention_forward.default,
    aten._efficient_attention_forward.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.megascale.masked_attention.default,
    torch.ops.megascale.sink_attention.default,
    ring.OPERATOR,
    delta.OPERATOR,
    delta_rule.OPERATOR,
    delta_kernel.OPERATOR,
    torch.ops.megascale.fp8_product.default,
    torch.ops.megascale.product.default,
    torch.ops.megascale.product_by_expert.default,
    torch.ops.higher_order.flex_attention,
    # FP8 products by torch's own operators, whose names depend on its version.
    *(getattr(aten, name).default for name in SCALED if hasattr(aten, name)),
    # Results of exchanges inside a graph: sending again costs more than keeping them.
    functional.ops.all_reduce.default,
    functional.ops.reduce_scatter_tensor.default,
    functional.ops.all_to_all_single.default,
    torch.ops.megascale.send_rows.default,
    torch.ops.megascale.move_rows.default,
    torch.ops.megascale.fp8_by_expert.default,
    aten._scaled_grouped_mm.default,
}

Recomputation = Callable[[Callable[..., Any]], Callable[..., Any]]
# Dropout masks are hashes, not draws: there is no generator state to restore.
PLAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


def wrap_blocks(model: Family, mode: str, backend: Backend | None, budget: float = 1.0) -> None:
    """Recomputes and compiles every block.

    mode     `none`, `selective`, `full` (only a block's input is kept), `nested` (every √n-th input, and those of one group at a time), or
             `budget`, where the compiler chooses what to keep
    budget   its share of what the compiler would keep by itself
    backend  the torch.compile backend; None: eager

    A compiled block is one graph and is recomputed inside it, where the compiler sees both passes.
    """
    routers = any(isinstance(m, Router) for m in model.modules())
    model.exchanges.loss_backend = backend
    if mode == "budget":
        assert backend is not None
        mode, backend = "none", within_budget(backend, budget)
    recomputed = recomputation(mode, routers)
    for _, block in model.units():
        if backend is None:
            block.forward = recomputed(block.forward)  # type: ignore[method-assign]
        else:
            block.forward = compile_static(recomputation(mode, routers, True)(block.forward), backend=backend)  # type: ignore[method-assign]
    for module in model.joins() if backend is not None else ():
        module.joined = compile_static(module.joined, backend=backend)  # type: ignore[method-assign]
    if mode == "nested":
        model.exchanges.pass_blocks = partial(in_groups, recomputed=recomputed)


def within_budget(backend: Backend, budget: float) -> Backend:
    """A backend whose graphs keep this share of what they would keep for backward; the compiler chooses what is cheapest to recompute."""
    from torch._dynamo import lookup_backend  # imports the compiler
    from torch._functorch import config as settings

    inner = lookup_backend(backend)

    def compiled(graph: Any, inputs: Any, **options: Any) -> Any:
        with settings.patch(activation_memory_budget=budget):
            return inner(graph, inputs, **options)

    return compiled


def recomputation(mode: str, routers: bool = False, in_graph: bool = False) -> Recomputation:
    """Wraps a function so that its backward pass recomputes what it needs. `routers`: the function may contain routers."""
    if mode == "none":
        return lambda function: function
    # The compiler warns, on every rank, that in-place operations would go wrong under a policy: blocks have none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    options = PLAIN
    if mode == "selective":
        options = PLAIN | {"context_fn": partial(create_selective_checkpoint_contexts, partial(_policy, KEPT))}
    elif routers and in_graph:
        options = PLAIN | {"context_fn": partial(create_selective_checkpoint_contexts, partial(_policy, CHOICES))}
    elif routers:
        options = PLAIN | {"context_fn": _choices}
    return lambda function: partial(checkpoint, function, **options)


def in_groups(x: Tensor, blocks: Iterable[Pass], recomputed: Recomputation) -> Tensor:
    """`in_turn`, recomputed in ⌈√n⌉ groups (Chen et al., arXiv 1604.06174, section 4): backward runs a group forward again for its blocks'
    inputs, and each block for its intermediates. n blocks keep about 2√n inputs and cost two more forwards.
    """
    passes = list(blocks)
    size = group_size(len(passes))
    for begin in range(0, len(passes), size):
        x = recomputed(in_turn)(x, passes[begin : begin + size])
    return x


def group_size(blocks: int) -> int:
    """Blocks per group, ⌈√n⌉, so that the number of groups differs by at most one."""
    return max(1, math.isqrt(blocks - 1) + 1) if blocks else 1


def _policy(kept: set[Any], _: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _choices() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Contexts for a forward pass and its recomputation. torch's own contexts would count every operation, including those of FSDP2's hooks
    on experts, which differ in a recomputation.
    """
    kept: list[Any] = []
    return _Keep(kept), _Repeat(kept)


class _Keep(TorchDispatchMode):
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Otherwise nothing would be compiled under this mode."""
        return True

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in CHOICES:
            self.kept.append(tree_map(torch.Tensor.detach, result))
        return result


class _Repeat(_Keep):
    def __enter__(self) -> Any:
        self.left = iter(self.kept)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CHOICES:
            return tree_map(torch.Tensor.detach, next(self.left))
        return func(*args, **(kwargs or {}))
