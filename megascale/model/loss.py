"""Head product and cross-entropy in one step, in chunks of tokens, so that [tokens, vocabulary] never exists at once.

Shapes: T tokens, d hidden, V rows of the head here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megascale.comm.collectives import all_reduce
from megascale.comm.mesh import Axis
from megascale.model.layers import linear
from megascale.model.ops.compiled import Backend, compile_static
from megascale.model.ops.matmul import product

# Logits held at once: 512 MiB in bf16. Each chunk passes once over the gradient of the whole head, so few chunks are faster.
CHUNK_ELEMENTS = 1 << 28
# On CPUs a chunk of 16 MiB stays in the cache between its passes and in the heap between steps, while larger ones are returned to the
# system and faulted in again; but below CPU_ROWS tokens products get slow.
CPU_ELEMENTS, CPU_ROWS = 1 << 22, 256


def cross_entropy_sum(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float,
    first: int,
    vocab_size: int,
    axis: Axis | None,
    backend: Backend | None = None,
    bias: Tensor | None = None,
    shadow: Tensor | None = None,
    cap: float | None = None,
    told: Tensor | None = None,
) -> Tensor:
    """Σ over valid targets of −log softmax(x·Wᵀ + bias)[target], times `scale`; a 0-dim tensor of at least fp32. With a `cap` c logits are
    c·tanh(logit ÷ c).

    x [T, d]; weight [V, d] and bias [V], rows first…first+V of the vocabulary, where rows from `vocab_size` on are padding; targets [T],
    negative ones are not counted. With an axis the vocabulary is sharded over its ranks and all return the same loss; the gradient of x is
    then a partial sum. `scale` is applied before gradients are rounded to x's dtype. `backend`: of torch.compile, which fuses the passes
    over a chunk; None: eager. `shadow`: the weight in x's dtype, if there is one; the gradient stays as exact as without.
    `told` [2, T]: takes the loss of each target, and 1 where it is not the likeliest token, 0 where it is.
    """
    return _CrossEntropySum.apply(x, weight, targets, scale, first, vocab_size, axis, backend, bias, shadow, cap, told)  # type: ignore[no-any-return]


def one_for(loss: Tensor) -> Tensor:
    """The gradient to begin a backward pass with, marked: if it reaches the loss as it is, a multiplication of the head's gradient by it, a
    pass of up to 2 GB, is left out.
    """
    one: Any = torch.ones_like(loss)
    one.is_one = True
    return one  # type: ignore[no-any-return]


def likeliest(x: Tensor, weight: Tensor, first: int, vocab_size: int, axis: Axis | None) -> Tensor:
    """x [T, d] → the tokens [T] with the largest logits, the first of equal ones; arguments as in `cross_entropy_sum`. No gradient."""
    w, found = weight.to(x.dtype), []
    real = min(max(vocab_size - first, 0), w.shape[0])
    for rows in x.split(max(1, CHUNK_ELEMENTS // w.shape[0])):
        logits = linear(rows, w, None)
        logits[:, real:] = float("-inf")
        top, token = logits.max(1)
        if axis is not None:
            here = top == all_reduce(top.clone(), axis, "max")
            token = -all_reduce(torch.where(here, -(token + first), -vocab_size), axis, "max")
        found.append(token)
    return torch.cat(found)


class _CrossEntropySum(torch.autograd.Function):
    """Computes gradients in forward, while a chunk's logits exist: three products instead of recomputation's four."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        first: int,
        vocab_size: int,
        axis: Axis | None,
        backend: Backend | None,
        bias: Tensor | None,
        shadow: Tensor | None,
        cap: float | None,
        told: Tensor | None,
    ) -> Tensor:
        w, b = weight.to(x.dtype) if shadow is None else shadow, None if bias is None else bias.to(x.dtype)
        exact = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=x.device)
        need_x, need_w, need_b = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[8]
        grad_x = torch.empty_like(x) if need_x else None
        grad_w: Tensor | None = None
        grad_b = torch.zeros(w.shape[0], dtype=exact, device=x.device) if need_b else None
        elements = CHUNK_ELEMENTS
        if x.device.type == "cpu":
            elements = min(elements, max(CPU_ELEMENTS, CPU_ROWS * w.shape[0]))
        # As equal as possible: a short last chunk would be slow, and each size is compiled separately.
        step = -(-x.shape[0] // max(1, -(-x.shape[0] * w.shape[0] // elements)))
        # A number that changes every step must be data for the compiler.
        factor = torch.full((), scale, dtype=exact, device=x.device)
        chunk = _chunk if backend is None else _compiled_chunk(backend)
        for start in range(0, x.shape[0], max(1, step)):
            rows = slice(start, start + step)
            raw = linear(x[rows], w, b)
            need = need_x or need_w or need_b
            loss, d_logits, *each = chunk(raw, targets[rows], factor, first, vocab_size, axis, need, exact, cap, told is not None)
            total += loss
            if told is not None:
                told[0, rows], told[1, rows] = each
            if grad_x is not None:
                grad_x[rows] = linear(d_logits, w.t())
            if need_w:
                grad_w = _add_product(grad_w, d_logits, x[rows], exact if step < x.shape[0] else x.dtype)
            if grad_b is not None:
                grad_b += d_logits.sum(0, dtype=exact)
        if need_x or need_w or need_b:
            ctx.save_for_backward(
                grad_x,
                None if grad_w is None else grad_w.to(weight.dtype),
                None if grad_b is None or bias is None else grad_b.to(bias.dtype),
            )
        return total * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        g = grads[0]
        if hasattr(g, "is_one"):
            to_x, to_w, to_b = ctx.saved_tensors
            return to_x, to_w, *[None] * 6, to_b, None, None, None
        # In place: a second gradient of the whole head would be this step's largest tensor.
        to_x, to_w, to_b = (None if grad is None else grad.mul_(g.to(grad.dtype)) for grad in ctx.saved_tensors)
        return to_x, to_w, *[None] * 6, to_b, None, None, None


def _add_product(total: Tensor | None, d_logits: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """total + d_logitsᵀ·x [V, d] in `dtype`: chunks add up in full precision, in the product itself if possible."""
    if total is None:
        return product(d_logits.t(), x).to(dtype)
    if x.dtype == dtype:
        return total.addmm_(d_logits.t(), x)
    if x.device.type == "cuda":
        return torch.addmm(total, d_logits.t(), x, out_dtype=dtype, out=total)
    return total.add_(product(d_logits.t(), x))


@cache
def _compiled_chunk(backend: Backend) -> Callable[..., tuple[Tensor, ...]]:
    return compile_static(_chunk, backend=backend)


def _chunk(
    raw: Tensor,
    targets: Tensor,
    scale: Tensor,
    first: int,
    vocab_size: int,
    axis: Axis | None,
    need_grad: bool,
    exact: torch.dtype,
    cap: float | None,
    tells: bool,
) -> tuple[Tensor, ...]:
    """Logits [t, V] of one chunk → (its loss sum, the gradient of its logits in their dtype; without need_grad, the exponentials). If it
    `tells`, also each target's loss, and whether another token is likelier.
    """
    logits = raw.to(exact) if cap is None else (raw.to(exact) / cap).tanh_().mul_(cap)
    real = vocab_size - first
    if real < logits.shape[1]:
        logits[:, max(real, 0) :] = float("-inf")
    top = logits.amax(dim=1, keepdim=True)
    if axis is not None:
        top = all_reduce(top, axis, "max")
    column = (targets - first).unsqueeze(1)
    here = (column >= 0) & (column < logits.shape[1]) & (targets >= 0).unsqueeze(1)
    column = column.where(here, column.new_zeros(()))
    logits -= top
    target_logit = logits.gather(1, column).where(here, logits.new_zeros(()))
    logits.exp_()
    denominator = logits.sum(dim=1, keepdim=True)
    if axis is not None:
        denominator, target_logit = all_reduce(torch.cat((denominator, target_logit), 1), axis).split(1, dim=1)
    valid = (targets >= 0).unsqueeze(1)
    each = (denominator.log() - target_logit).where(valid, logits.new_zeros(()))
    loss = each.sum()
    more = (each[:, 0], (target_logit < 0)[:, 0].to(exact)) if tells else ()  # logits count from the largest
    del each  # or it would be here with the gradient
    if not need_grad:
        return loss, logits, *more
    # d loss / d logits = softmax − one-hot, on valid rows, scaled before it is rounded.
    factor = (scale / denominator) * valid
    if torch.compiler.is_compiling():
        # A comparison is fused into the pass over the logits; a scatter makes the compiler write them out in fp32 and read them again.
        at_target = (torch.arange(logits.shape[1], device=raw.device) == column) & here
        d_logits = torch.where(at_target, logits * factor - scale, logits * factor)
        return loss, (d_logits if cap is None else d_logits * _slope(raw, cap, exact)).to(raw.dtype), *more
    logits *= factor
    logits.scatter_add_(1, column, (here.to(exact) * -scale))
    if cap is not None:
        logits *= _slope(raw, cap, exact)
    return loss, logits.to(raw.dtype), *more


def _slope(raw: Tensor, cap: float, exact: torch.dtype) -> Tensor:
    """The derivative of cap·tanh(raw ÷ cap), computed again instead of kept through the passes over a chunk."""
    return 1 - (raw.to(exact) / cap).tanh_().square_()
