"""Rows, the assignments of tokens to experts: sorted by expert, multiplied block by block with each expert's matrix, and put back.

Shapes: n tokens or rows, k chosen experts a token, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _Permute(torch.autograd.Function):
    """x[order] for a permutation. Its gradient is another gather, where indexing's own would be a slow scattered sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _, inverse = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x [n, …] in the order `order` [n]; `inverse` undoes it."""
    return _Permute.apply(x, order, inverse)  # type: ignore[no-any-return]


class _Spread(torch.autograd.Function):
    """Tokens [T, d] → rows [T·k, d] in the order `order`; gradients are summed over a token's rows in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class Sort(NamedTuple):
    """The assignments [n, k] of n tokens as rows sorted by expert: `order` [n·k] and what undoes it."""

    order: Tensor
    inverse: Tensor
    top_k: int

    @classmethod
    def of(cls, experts: Tensor) -> Sort:
        order = experts.flatten().argsort(stable=True)
        return cls(order, inverse_of(order), experts.shape[1])

    def spread(self, x: Tensor) -> Tensor:
        """Tokens [n, d] → rows [n·k, d]."""
        return _Spread.apply(x, self.order, self.inverse, self.top_k)  # type: ignore[no-any-return]

    def gather(self, rows: Tensor) -> Tensor:
        """Rows [n·k, d] → the results [n, k, d] of each token's experts."""
        return permute(rows, self.inverse, self.order).unflatten(0, (-1, self.top_k))


def inverse_of(order: Tensor) -> Tensor:
    """The permutation that undoes `order` [n]."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


def has_grouped_product(x: Tensor, weight: Tensor) -> bool:
    """PyTorch's grouped product knows fp32 and bf16, and rows of a multiple of 16 bytes."""
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    return hasattr(torch, "_grouped_mm") and x.dtype in (torch.float32, torch.bfloat16) and aligned


class _RoundedByExpert(torch.autograd.Function):
    """`grouped_product` with weights that are kept in another dtype than x's, for CPUs: each expert's matrix is rounded when its rows meet
    it, and its gradient is added to what earlier micro-batches left.

    A rounded bank, its gradient and the widened gradient would be 8 bytes a weight of new memory every micro-batch, of which a CPU spends
    longer on handing out the pages than on the copies; here one matrix at a time stays in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.sizes = weight, sizes
        parts = [part @ w.to(x.dtype).t() for part, w in zip(x.split([*sizes, x.shape[0] - sum(sizes)]), weight) if len(part)]
        return torch.cat([*parts, x.new_zeros((x.shape[0] - sum(sizes), weight.shape[1]))])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), weight, sizes = ctx.saved_tensors, ctx.weight, ctx.sizes
        rest = x.shape[0] - sum(sizes)
        blocks = [*zip(weight, x.split([*sizes, rest]), grads[0].split([*sizes, rest]))]
        into_x = into_weight = None
        if ctx.needs_input_grad[0]:
            into_x = torch.cat([*(g @ w.to(g.dtype) for w, _, g in blocks if len(g)), x.new_zeros((rest, x.shape[1]))])
        if ctx.needs_input_grad[1]:
            # Hooks want to see a gradient; without them it need not exist apart from the sum.
            adds = weight.is_leaf and weight.grad is not None and not weight._backward_hooks and not weight._post_accumulate_grad_hooks
            into_weight = None if adds else torch.empty_like(weight)
            for total, (_, a, g) in zip(weight.grad if into_weight is None else into_weight, blocks):
                if into_weight is None:
                    total.add_(g.t() @ a)
                else:
                    total.copy_(g.t() @ a)  # zero where no row came
        return into_x, into_weight, None


def grouped_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [n, in] sorted by expert, weight [E, out, in], counts [E] rows of each expert → [n, out].

    Rows beyond the sum of the counts are undefined, and so are their gradients.
    """
    if weight.dtype != x.dtype and x.device.type == "cpu":
        return _RoundedByExpert.apply(x, weight, counts.tolist())  # type: ignore[no-any-return]
    weight = weight.to(x.dtype)
    if has_grouped_product(x, weight):
        return torch._grouped_mm(x, weight.mT, offs=counts.cumsum(0).to(torch.int32))
    sizes = counts.tolist()
    rest = x.shape[0] - sum(sizes)
    *parts, _ = x.split([*sizes, rest])
    return torch.cat([*(F.linear(part, w) for part, w in zip(parts, weight.unbind(0))), x.new_zeros((rest, weight.shape[1]))])
