"""What an operation costs: whether it launches a kernel, its FLOPs, and the bytes that it reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

# Memory without values, or none at all.
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "resize_", "set_"}
VIEWS = {"detach", "alias", "lift_fresh", "is_pinned", "record_stream", "_record_function_enter_new", "_record_function_exit"}
FILLED = {"fill_", "zero_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_full", "new_ones", "arange"}
PICKED = {"embedding", "index_select", "gather", "index"}
FORMATS = {
    torch.bfloat16: "bf16",
    torch.float16: "bf16",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
}
BATCHED = 100  # tensors of a kernel over lists


class Work(NamedTuple):
    """`factors`: the format of the product's factors, "attention" or "grouped"."""

    flops: float
    moved: float
    factors: str
    kernels: int


@cache
def kind_of(function: Any) -> str:
    """ "kernel", "empty" (memory alone) or "view" (neither)."""
    name = name_of(function)
    if name in EMPTY:
        return "empty"
    aliases = [r.alias_info for r in function._schema.returns]
    if name in VIEWS or any(a is not None and not a.is_write for a in aliases) or function.namespace == "prim":
        return "view"
    return "kernel"


@cache
def name_of(function: Any) -> str:
    """The operation's name without its namespace."""
    return str(function._schema.name).partition("::")[2]


def work_of(function: Any, args: Sequence[Any], kwargs: dict[str, Any], given: Sequence[Tensor], made: Sequence[Tensor], out: Any) -> Work:
    """The work of a kernel with the tensors `given` and `made`, its result being `out`."""
    name = name_of(function)
    read = sum(x.nbytes for x in given)
    known = {x.untyped_storage()._cdata for x in given}
    written = sum(x.nbytes for x in made if name.endswith("_") or x.untyped_storage()._cdata not in known)
    moved = float(written or read) if name in FILLED else 2.0 * written if name in PICKED else float(read + written)
    lists = name.startswith(("_foreach", "_fused_adam")) and args and isinstance(args[0], list | tuple)
    kernels = max(1, -(-len(args[0]) // BATCHED)) if lists else 1
    flops = flops_of(function, args, kwargs, out)
    if not flops:
        return Work(0.0, moved, "bf16", kernels)
    if "attention" in name:
        named = {a.name: value for a, value in zip(function._schema.arguments, args)} | kwargs
        causal = named.get("is_causal") is True
        return Work(flops / 2 if causal else flops, moved, "attention", kernels)
    factor = next((x for x in reversed(given) if x.is_floating_point()), None)
    format_ = FORMATS.get(factor.dtype, "fp32") if factor is not None else "fp32"
    return Work(flops, moved, "grouped" if "grouped" in name and format_ == "bf16" else format_, kernels)


def flops_of(function: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> float:
    """FLOPs of a product or of attention; 0 for everything else, which memory limits."""
    name = name_of(function)
    own = OWN.get(name)
    if own is not None:
        return float(own(*args))
    rule = flop_registry.get(function._overloadpacket)
    return 0.0 if rule is None else float(rule(*args, **kwargs, out_val=out))


def _product(a: Tensor, b: Tensor, *_: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[-1]


def _added(_: Tensor, a: Tensor, b: Tensor, *__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _linear(a: Tensor, b: Tensor, *_: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[0]


def _by_expert(x: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * x.shape[0] * weight.shape[1] * weight.shape[2]


# torch's rules refuse some forms of the first four, and do not know ours.
OWN: dict[str, Callable[..., int]] = {
    "mm": _product,
    "addmm": _added,
    "addmm_": _added,
    "baddbmm": _added,
    "fp8_product": _linear,
    "product_by_expert": _by_expert,
}
