"""The gated delta rule by flash-linear-attention's fused kernels on GPUs, taken by symbol, with a sentence where they are missing.

The kernels know neither documents nor heads that share a key: keys are repeated, and the first token of a document leaves e^−50 of what
came before, less than any rounding. It is one operator, so that torch.compile and recomputation treat it as a unit; backward runs forward
again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megascale.model.ops.delta_rule import delta_rule

MODULE, SYMBOL = "fla.ops.gated_delta_rule", "chunk_gated_delta_rule"
WIDEST = 256  # channels of a key that the kernels take
FORGOTTEN = -50.0

Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def choose_rule(wanted: str, key_dim: int, compute: torch.dtype, device: torch.device) -> tuple[Rule, str]:
    """The implementation for a run and the reason for the log. `wanted`: run.kernels; all but torch take the fused one where it works."""
    if wanted == "torch" or device.type != "cuda":
        return delta_rule, "torch: " + (
            "run.kernels asks for it" if wanted == "torch" else f"fused kernels run on CUDA, not on {device.type}"
        )
    if compute != torch.bfloat16 or key_dim > WIDEST:
        return delta_rule, f"torch: fused kernels take bf16 and at most {WIDEST} channels of a key, here {compute} and {key_dim}"
    if kernel() is None:
        return delta_rule, f"torch: {MODULE} has no {SYMBOL} here; pip install flash-linear-attention for fused kernels"
    return fused_rule, f"flash-linear-attention: {SYMBOL} found"


def kernel() -> Callable[..., Any] | None:
    """flash-linear-attention's function, or None without it."""
    try:
        return getattr(importlib.import_module(MODULE), SYMBOL, None)
    except Exception:  # a broken installation may raise anything at import; treat it as absent
        return None


def fused_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, age: Tensor | None) -> Tensor:
    """`delta_rule` by the fused kernels."""
    return _rule(q, k, v, g, beta, age)  # type: ignore[no-any-return]


def _inputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, age: Tensor | None) -> list[Tensor]:
    """What the kernels take, as leaves of a graph of their own."""
    r = v.shape[2] // q.shape[2]
    if age is not None:
        g = g.masked_fill((age == 0).unsqueeze(2), FORGOTTEN)
    return [x.detach() for x in (q.repeat_interleave(r, 2), k.repeat_interleave(r, 2), v, g, beta)]


def _call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    function = kernel()
    assert function is not None, "choose_rule found it"
    return function(q, k, v, g=g, beta=beta, scale=1.0)[0]  # type: ignore[no-any-return]


@torch.library.custom_op(
    "megascale::fused_delta_rule",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? age) -> Tensor",
)
def _rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, age: Tensor | None) -> Tensor:
    with torch.no_grad():
        return _call(*_inputs(q, k, v, g, beta, age)).to(v.dtype).contiguous()


@torch.library.custom_op(
    "megascale::fused_delta_rule_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? age) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _rule_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, age: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = q.shape[2]
    leaves = [x.requires_grad_() for x in _inputs(q, k, v, g, beta, age)]
    with torch.enable_grad():
        out = _call(*leaves)
    d_q, d_k, d_v, d_g, d_beta = torch.autograd.grad(out, leaves, d_out.to(out.dtype))
    d_q, d_k = (x.unflatten(2, (n, -1)).sum(3) for x in (d_q, d_k))
    if age is not None:
        d_g = d_g.masked_fill((age == 0).unsqueeze(2), 0.0)
    return tuple(d.to(x.dtype).contiguous() for d, x in zip((d_q, d_k, d_v, d_g, d_beta), (q, k, v, g, beta)))  # type: ignore[return-value]


@_rule.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@_rule_backward.register_fake
def _(d_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:5])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    return (*_rule_backward(d_out, *ctx.saved_tensors), None)


_rule.register_autograd(_backward, setup_context=_keep)
OPERATOR = torch.ops.megascale.fused_delta_rule.default
