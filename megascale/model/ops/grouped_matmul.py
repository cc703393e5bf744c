"""Rows, the assignments of tokens to experts: sorted by expert, multiplied block by block with each expert's matrix, and put back.

Shapes: n tokens or rows, k chosen experts per token, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.model.ops import matmul, matmul_cpu


class _Permute(torch.autograd.Function):
    """x[order] for a permutation. Its gradient is another gather; indexing's own would be a slow scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _, inverse = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x [n, …] permuted by `order` [n]; `inverse` undoes it."""
    return _Permute.apply(x, order, inverse)  # type: ignore[no-any-return]


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return _picked(x, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _, inverse = ctx.saved_tensors
        return _picked(grads[0], inverse), None, None


def pick(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`permute` for some of the rows of x [n, …] into some places [m]: −1 in `order` [m] is a row of zeros, −1 in `inverse` [n] goes
    nowhere.
    """
    return _Pick.apply(x, order, inverse)  # type: ignore[no-any-return]


def _picked(x: Tensor, order: Tensor) -> Tensor:
    # Not a product with the mask: what goes nowhere may be undefined.
    return x.index_select(0, order.clamp(min=0)).where(order.unsqueeze(1) >= 0, x.new_zeros(()))


def places(counts: Tensor, sources: Tensor, targets: Tensor, of: int, to: int) -> tuple[Tensor, Tensor]:
    """Blocks of `counts` [m] rows lie at `sources` [m] and move to `targets` [m], ascending and disjoint: the order [to] in which `pick`
    takes them, and its inverse [of]; −1 for none. Without sorting.
    """
    place = torch.arange(to, device=counts.device)
    block = torch.searchsorted(targets + counts, place, right=True).clamp(max=counts.shape[0] - 1)
    offset = place - targets[block]
    taken = (offset >= 0) & (offset < counts[block])
    order = sources[block] + offset
    # What has no source is written behind the end.
    inverse = torch.full((of + 1,), -1, dtype=place.dtype, device=place.device).scatter_(0, order.where(taken, of), place)
    return order.where(taken, -1), inverse[:of]


class _PermuteTokens(torch.autograd.Function):
    """Tokens [T, d] → rows [T·k, d] in the order `order`; gradients are summed over a token's rows in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        return sum_of_rows(grads[0], inverse.view(-1, ctx.top_k)), None, None, None


def sum_of_rows(rows: Tensor, places: Tensor) -> Tensor:
    """Σᵢ rows[places[:, i]] for places [T, k] → [T, d], added up in at least fp32 and rounded once."""
    if rows.device.type != "cpu":
        return F.embedding_bag(places, rows, mode="sum")
    # There `embedding_bag` rounds ties, frequent in sums of two bf16 numbers, away from zero: gradients would grow by 7e-4.
    wide = rows.dtype if places.shape[1] <= 2 else torch.promote_types(rows.dtype, torch.float32)
    total = rows.index_select(0, places[:, 0]).to(wide)
    for i in range(1, places.shape[1]):
        total.add_(rows.index_select(0, places[:, i]))
    return total.to(rows.dtype)


class _UnpermuteTokens(torch.autograd.Function):
    """Rows [T·k, d] in the order `order` and gates [T, k] → each token's sum [T, d]. Its gradient needs no rows in token order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gates, order, inverse)
        return F.embedding_bag(inverse.view_as(gates), rows, mode="sum", per_sample_weights=gates)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, gates, order, inverse = ctx.saved_tensors
        g = grads[0].index_select(0, order // gates.shape[1])
        into_gates = (rows * g).sum(-1).index_select(0, inverse).view_as(gates)
        return g * gates.flatten().index_select(0, order).unsqueeze(1), into_gates, None, None


class _SumTokens(torch.autograd.Function):
    """Rows [T·k, d] in the order `order` → the sum of each token's [T, d]: `_PermuteTokens` the other way round."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return sum_of_rows(rows, inverse.view(-1, top_k))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order // ctx.top_k), None, None, None


class Permutation(NamedTuple):
    """The assignments [n, k] of n tokens as rows sorted by expert: `order` [n·k] and its inverse."""

    order: Tensor
    inverse: Tensor
    top_k: int

    @classmethod
    def of(cls, experts: Tensor) -> Permutation:
        order = experts.flatten().to(torch.int32).argsort(stable=True)
        return cls(order, inverse_of(order), experts.shape[1])

    def permute(self, x: Tensor) -> Tensor:
        """Tokens [n, d] → rows [n·k, d]."""
        return _PermuteTokens.apply(x, self.order, self.inverse, self.top_k)  # type: ignore[no-any-return]

    def gather(self, rows: Tensor) -> Tensor:
        """Rows [n·k, d] → the results [n, k, d] of each token's experts."""
        return permute(rows, self.inverse, self.order).unflatten(0, (-1, self.top_k))

    def unpermute(self, rows: Tensor, gates: Tensor) -> Tensor:
        """Rows [n·k, d], each times its gate [n, k], summed over a token's experts → [n, d]."""
        return _UnpermuteTokens.apply(rows, gates, self.order, self.inverse)  # type: ignore[no-any-return]

    def sum(self, rows: Tensor) -> Tensor:
        """Rows [n·k, d] summed over a token's experts → [n, d]."""
        return _SumTokens.apply(rows, self.order, self.inverse, self.top_k)  # type: ignore[no-any-return]


def inverse_of(order: Tensor) -> Tensor:
    """The permutation that undoes `order` [n]."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


def adds_in_place(weight: Tensor) -> bool:
    """Whether products may add to `weight.grad` themselves: on CPUs, where no hook needs to see the addition."""
    return weight.is_leaf and weight.device.type == "cpu" and not weight._backward_hooks and not weight._post_accumulate_grad_hooks


def blocks_of(x: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """Each expert's rows of x [n, …], and the rows beyond the sum of the counts [E]."""
    sizes = counts.tolist()
    return x.split([*sizes, x.shape[0] - sum(sizes)])


def add_by_expert(total: Tensor, x: Tensor, g: Tensor, counts: Tensor) -> None:
    """The weights' gradient from the rows' x [n, in] and g [n, out], added to `total` [E, out, in]."""
    part = total.new_empty(total.shape[1:], dtype=g.dtype)
    for into, a, b in zip(total, blocks_of(x, counts), blocks_of(g, counts)):
        if len(a):
            into.add_(matmul.product(b.t(), a) if matmul.widens(a, b) else torch.mm(b.t(), a, out=part))


@torch.library.custom_op("megascale::product_by_expert", mutates_args=())
def product_by_expert(x: Tensor, weight: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    """Rows x [n, in] sorted by expert through weight [E, out, in], or [n, out] through its transpose; `counts` [E]: rows per expert.

    One operator, so that recomputation can keep its result, and one buffer for a rounded matrix: allocating new memory costs more than
    rounding.
    """
    _, out_dim, in_dim = weight.shape
    y = x.new_empty((x.shape[0], in_dim if transposed else out_dim))
    rounded = weight.new_empty((out_dim, in_dim), dtype=x.dtype) if weight.dtype != x.dtype else None
    for w, rows, out in zip(weight, blocks_of(x, counts), blocks_of(y, counts)):
        if len(rows):
            w = w if rounded is None else rounded.copy_(w)
            w = w.t() if transposed else w
            if matmul_cpu.takes(rows, w):
                out.copy_(matmul_cpu.product(rows, w))
            elif matmul.widens(rows, w):
                out.copy_(matmul.linear(rows, w))
            else:
                torch.mm(rows, w.t(), out=out)
    return y


@product_by_expert.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2 if transposed else 1]))


@torch.library.custom_op("megascale::weight_gradient_by_expert", mutates_args=())
def weight_gradient_by_expert(weight: Tensor, x: Tensor, g: Tensor, counts: Tensor) -> Tensor:
    """The gradient of weight [E, out, in] from the rows' x [n, in] and g [n, out]."""
    total = torch.zeros_like(weight)
    add_by_expert(total, x, g, counts)
    return total


@weight_gradient_by_expert.register_fake
def _(weight: Tensor, x: Tensor, g: Tensor, counts: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _product_backward(ctx: Any, g: Tensor) -> Any:
    x, weight, counts = ctx.saved_tensors
    into_x = product_by_expert(g, weight, counts, True) if ctx.needs_input_grad[0] else None
    into_weight = weight_gradient_by_expert(weight, x, g, counts) if ctx.needs_input_grad[1] else None
    return into_x, into_weight, None, None


# In a graph. Outside, _ByExpert adds to gradients in place.
product_by_expert.register_autograd(_product_backward, setup_context=_save_product)


class _ByExpert(torch.autograd.Function):
    """`grouped_product` one expert after the other, for CPUs and for inputs that the grouped product does not support.

    Weights are rounded to x's dtype when their expert's rows are multiplied, and their gradient is added to that of earlier micro-batches.
    A rounded bank, its gradient and the widened gradient would be 8 bytes per weight of new memory every micro-batch, whose page faults
    cost a CPU more than the copies; here one matrix at a time stays in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, counts)
        ctx.weight = weight
        return product_by_expert(x, weight, counts, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, counts), (g,), weight = ctx.saved_tensors, grads, ctx.weight
        into_x = product_by_expert(g, weight, counts, True) if ctx.needs_input_grad[0] else None
        into_weight = None
        if ctx.needs_input_grad[1]:
            total = weight.grad if adds_in_place(weight) else None
            if total is None:
                total = into_weight = torch.zeros_like(weight)
            add_by_expert(total, x, g, counts)
        return into_x, into_weight, None


def grouped_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [n, in] sorted by expert, weight [E, out, in], counts [E]: rows per expert → [n, out].

    Rows beyond the sum of the counts are undefined, and so are their gradients.
    """
    if by_expert(x, weight):
        graph = torch.compiler.is_compiling()
        return product_by_expert(x, weight, counts, False) if graph else _ByExpert.apply(x, weight, counts)  # type: ignore[no-any-return]
    return in_one(x, weight, counts)


def by_expert(x: Tensor, weight: Tensor) -> bool:
    """PyTorch's grouped kernel takes bf16 and rows of a multiple of 16 bytes. In fp32 it is a loop in which the host waits for
    each expert and which no graph can contain on CUDA, and on CPUs a loop with new memory: ours waits once a product.
    """
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    known = hasattr(torch, "_grouped_mm") and x.dtype == torch.bfloat16 and aligned
    return x.device.type == "cpu" or not known


def in_one(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`grouped_product` as one kernel, without a synchronization for the counts."""
    return torch._grouped_mm(x, weight.to(x.dtype).mT, offs=counts.cumsum(0).to(torch.int32))


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
        of_row = torch.searchsorted(counts.cumsum(0), torch.arange(x.shape[0], device=x.device), right=True)
        ctx.save_for_backward(of_row)
        ctx.experts = bias.shape[0]
        return x + bias.index_select(0, of_row.clamp(max=bias.shape[0] - 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (of_row,), (g,) = ctx.saved_tensors, grads
        # A product, since sums by index have no fixed order on GPUs. Rows without an expert have undefined gradients.
        experts = torch.arange(ctx.experts, device=g.device)
        exists = (of_row < ctx.experts).unsqueeze(1)
        return g, (experts.unsqueeze(1) == of_row).to(g.dtype) @ g.where(exists, g.new_zeros(())), None


def add_bias(x: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
    """Rows x [n, out] sorted by expert, plus the bias [E, out] of each one's expert; `counts` [E]: rows per expert. Rows beyond their sum
    stay undefined.
    """
    return _AddBias.apply(x, bias, counts)  # type: ignore[no-any-return]
