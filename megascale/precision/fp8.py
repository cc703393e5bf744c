"""Products in FP8 with static scales: both factors are clamped, cast and multiplied, without measurements or state.

Values and weights go to e4m3 (±448), gradients to e5m2 (±57344), and the result of each product is multiplied with one constant (μnit
Scaling, arXiv 2502.05967). Casts are plain tensor operations, so that a compiler fuses them with what precedes; the product is one
operator, with CUDA's layout on every device.

Shapes: n rows (tokens), in and out features.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megascale.handles import telling

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
ALIGNED = 16  # CUDA's alignment of the summed dimension and of the second factor's rows


def to_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x clamped to the dtype's range and rounded to nearest even. NaN stays NaN; infinities become the largest value.

    The clamp matters: without it e5m2 rounds to infinity from 61440 on, and e4m3 differs between devices.
    """
    largest = LARGEST[dtype]
    return x.clamp(-largest, largest).to(dtype)


@torch.library.custom_op("megascale::fp8_product", mutates_args=())
def fp8_product(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """a [m, k] · b [n, k]ᵀ · scale → [m, n] in `dtype`, summed in fp32 and rounded once. Both factors have contiguous rows."""
    check_product(a, b)
    if a.device.type != "cpu":
        return torch._scaled_mm(a, b.t(), scale_a=_on_device(scale, a.device), scale_b=_on_device(1.0, a.device), out_dtype=dtype)
    # FP8 values are exact in fp32, and so are their products; only the order of the sum varies.
    return (a.to(torch.float32) @ b.to(torch.float32).t()).mul_(scale).to(dtype)


@lru_cache(maxsize=256)
def _on_device(scale: float, device: torch.device) -> Tensor:
    """A cached scalar tensor: otherwise every product would launch a kernel to fill one number."""
    return torch.full((), scale, dtype=torch.float32, device=device)


@fp8_product.register_fake
def _(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    check_product(a, b)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


def check_product(a: Tensor, b: Tensor) -> None:
    """CUDA's conditions, checked on every device, so that what runs on a laptop also runs there. Raises ValueError."""
    if a.shape[1] != b.shape[1] or a.shape[1] % ALIGNED or b.shape[0] % ALIGNED:
        raise ValueError(f"an FP8 product of {list(a.shape)} and {list(b.shape)}ᵀ: equal columns and multiples of {ALIGNED} are needed")
    if not (a.is_contiguous() and b.is_contiguous()):
        raise ValueError("an FP8 product takes factors with contiguous rows")
    if (a.dtype, b.dtype) not in ((E4M3, E4M3), (E5M2, E4M3)):
        raise ValueError(f"an FP8 product takes e4m3 or e5m2 times e4m3, not {a.dtype} times {b.dtype}")


class HeldFp8(torch.Tensor):
    """A weight that exists only in e4m3, as FSDP2 gathers it, but claims another dtype: autograd needs a leaf whose gradient has the leaf's
    dtype. `fp8_linear` uses the data; every other operation sees them widened.
    """

    data8: Tensor

    @staticmethod
    def __new__(cls, data8: Tensor, dtype: torch.dtype) -> HeldFp8:
        made: HeldFp8 = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, data8.shape, strides=data8.stride(), dtype=dtype, device=data8.device
        )
        made.data8 = data8
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        """Shows no numbers: compilers log tensors before they have any."""
        return f"HeldFp8({list(self.shape)}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["data8"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> HeldFp8:
        return HeldFp8(inner["data8"], dtype)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        name = function.overloadpacket
        if name in _SAME and isinstance(args[0], HeldFp8):
            return HeldFp8(args[0].data8, args[0].dtype)
        widen = lambda x: x.data8.to(x.dtype) if isinstance(x, HeldFp8) else x  # noqa: E731
        return function(*torch.utils._pytree.tree_map(widen, args), **torch.utils._pytree.tree_map(widen, kwargs or {}))


aten = torch.ops.aten
# Operations of FSDP2 and autograd on a whole weight that do not touch its numbers.
_SAME = {aten.detach, aten.alias, aten.as_strided, aten.view, aten.view_as}


def cast_losses(before: Tensor, after: Tensor) -> list[Tensor]:
    """Counts of one cast, 0-dim: nonzero numbers, those that became zero, and those beyond the largest."""
    with torch.no_grad():
        present = before != 0
        vanished = present & (after.to(torch.float32) == 0)
        return [present.sum(), vanished.sum(), (before.abs() > LARGEST[after.dtype]).sum()]


def weight_to_fp8(weight: Tensor, compute: torch.dtype) -> Tensor:
    """A weight in e4m3, through the compute dtype first: the same bits whether gathered in that dtype, in e4m3, or not at all."""
    return weight.data8 if isinstance(weight, HeldFp8) else to_fp8(weight.to(compute), E4M3)


def fp8_linear(x: Tensor, weight: Tensor, scale: float, watch: Tensor | None = None) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ · scale → [..., out] in x's dtype; forward and both products of backward in FP8. The object of the
    handle `watch` hears the losses of casting x and the gradient.
    """
    return _Linear.apply(x, weight, scale, watch)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: float, watch: Tensor | None) -> Tensor:
        x8, w8 = to_fp8(x.flatten(0, -2), E4M3), weight_to_fp8(weight, x.dtype)
        ctx.save_for_backward(x8, weight, watch)
        ctx.scale = scale
        y = fp8_product(x8, w8, scale, x.dtype).unflatten(0, x.shape[:-1])
        return y if watch is None else telling(y, watch, "input", cast_losses(x.flatten(0, -2), x8))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x8, weight, watch = ctx.saved_tensors
        dtype = grads[0].dtype
        g8 = to_fp8(grads[0].flatten(0, -2), E5M2)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(g8, weight_to_fp8(weight, dtype), ctx.scale, dtype).unflatten(0, grads[0].shape[:-1])
            if watch is not None:
                dx = telling(dx, watch, "gradient", cast_losses(grads[0].flatten(0, -2), g8))
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(g8, x8, ctx.scale, dtype)
        return dx, dw, None, None


def input_gradient(g8: Tensor, w8: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """g8 [n, out], w8 [out, in] → [n, in]."""
    return fp8_product(g8, w8.t().contiguous(), scale, dtype)


def weight_gradient(g8: Tensor, x8: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """g8 [n, out], x8 [n, in] → [out, in]. Pads n with rows of zeros to the product's alignment, since an expert may have any number of
    rows.
    """
    missing = -g8.shape[0] % ALIGNED
    if missing:
        g8, x8 = (torch.cat((t, t.new_zeros((missing, t.shape[1])))) for t in (g8, x8))
    return fp8_product(g8.t().contiguous(), x8.t().contiguous(), scale, dtype)


def fp8_grouped(x: Tensor, weight: Tensor, counts: Tensor, scale: float, watch: Tensor | None = None) -> Tensor:
    """x [n, in] sorted by expert, weight [E, out, in], counts [E] → [n, out]; rows beyond the sum of the counts are zero,
    on devices undefined.
    """
    return _Grouped.apply(x, weight, counts, scale, watch)  # type: ignore[no-any-return]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, scale: float, watch: Tensor | None) -> Tensor:
        ctx.scale = scale
        x8, w8 = to_fp8(x, E4M3), weight_to_fp8(weight, x.dtype)
        ctx.save_for_backward(x8, weight, counts, watch)
        y = _grouped_forward(x8, w8, counts, scale, x.dtype)
        return y if watch is None else telling(y, watch, "input", cast_losses(x, x8))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x8, weight, counts, watch), (g,) = ctx.saved_tensors, grads
        w8, g8 = weight_to_fp8(weight, g.dtype), to_fp8(g, E5M2)
        if _in_one_kernel(g):
            dx = torch._grouped_mm(g8.to(g.dtype), w8.to(g.dtype), offs=_ends(counts)).mul_(ctx.scale)
        else:
            dx = fp8_by_expert(g8, w8, counts, ctx.scale, g.dtype, True)
        if watch is not None:
            dx = telling(dx, watch, "gradient", cast_losses(g, g8))
        return dx, grouped_weight_gradient(g8, x8, counts, ctx.scale, g.dtype), None, None, None


def _grouped_forward(x8: Tensor, w8: Tensor, counts: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    if not (x8.is_cuda and dtype == torch.bfloat16):
        return fp8_by_expert(x8, w8, counts, scale, dtype, False)
    if torch.cuda.get_device_capability(x8.device) < (9, 0):
        return torch._grouped_mm(x8.to(dtype), w8.to(dtype).mT, offs=_ends(counts)).mul_(scale)
    scales = torch.full((x8.shape[0],), scale, device=x8.device), torch.ones(w8.shape[:2], device=x8.device)
    return torch._scaled_grouped_mm(x8, w8.mT, *scales, offs=_ends(counts), out_dtype=dtype)


def grouped_weight_gradient(g8: Tensor, x8: Tensor, counts: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """g8 [n, out] and x8 [n, in] sorted by expert → [E, out, in]."""
    if g8.is_cuda and dtype == torch.bfloat16:
        return torch._grouped_mm(g8.to(dtype).t(), x8.to(dtype), offs=_ends(counts)).mul_(scale)
    return fp8_weight_gradient_by_expert(g8, x8, counts, scale, dtype)


def _in_one_kernel(x: Tensor) -> bool:
    """On CUDA one kernel serves all experts, so the host needs no counts. Torch has it in FP8 only for e4m3: both products of backward
    multiply the same rounded numbers in bf16, which represents them exactly.
    """
    return x.is_cuda and x.dtype == torch.bfloat16


def _ends(counts: Tensor) -> Tensor:
    """End of each expert's rows, as grouped products need it."""
    return counts.cumsum(0).to(torch.int32)


@torch.library.custom_op("megascale::fp8_by_expert", mutates_args=())
def fp8_by_expert(x8: Tensor, w8: Tensor, counts: Tensor, scale: float, dtype: torch.dtype, transposed: bool) -> Tensor:
    """Rows x8 [n, in] sorted by expert through w8 [E, out, in], or [n, out] through its transpose; rows of no expert become zero."""
    y = x8.new_zeros((x8.shape[0], w8.shape[2 if transposed else 1]), dtype=dtype)
    begin = 0
    for w, size in zip(w8, counts.tolist()):
        if size:
            product = input_gradient if transposed else fp8_product
            y[begin : begin + size] = product(x8[begin : begin + size], w, scale, dtype)
        begin += size
    return y


@fp8_by_expert.register_fake
def _(x8: Tensor, w8: Tensor, counts: Tensor, scale: float, dtype: torch.dtype, transposed: bool) -> Tensor:
    return x8.new_empty((x8.shape[0], w8.shape[2 if transposed else 1]), dtype=dtype)


@torch.library.custom_op("megascale::fp8_weight_gradient_by_expert", mutates_args=())
def fp8_weight_gradient_by_expert(g8: Tensor, x8: Tensor, counts: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`grouped_weight_gradient`, one expert after the other."""
    sizes = counts.tolist()
    parts = zip(g8[: sum(sizes)].split(sizes), x8[: sum(sizes)].split(sizes))
    return torch.stack([weight_gradient(g, x, scale, dtype) for g, x in parts])


@fp8_weight_gradient_by_expert.register_fake
def _(g8: Tensor, x8: Tensor, counts: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return g8.new_empty((counts.shape[0], g8.shape[1], x8.shape[1]), dtype=dtype)
