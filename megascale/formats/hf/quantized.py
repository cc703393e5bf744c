"""Weights stored with few bits and a scale per block, as the numbers that they stand for.

mxfp4  32 values of 4 bits (sign, two bits of exponent, one of mantissa) share a power of two (OCP Microscaling Formats 1.0; GPT-OSS)
fp8    e4m3 values of a square block share a factor in fp32 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megascale.checkpoint.streaming import Target
from megascale.errors import UsageError
from megascale.formats.hf.family import Family
from megascale.formats.tensor_maps import Sizes, TensorSource

KEY = "quantization_config"
# e2m1: the values of four bits.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
GROUP, BIAS, NOT_A_NUMBER = 32, 127, 255  # values that share a scale; what is subtracted from its exponent; the exponent that is none
BLOCKS, SCALES, INVERSE = "_blocks", "_scales", "_scale_inv"


def problem_of(family: Family, config: Mapping[str, Any]) -> str | None:
    """Why the weights that the config describes cannot be read, if so."""
    given = config.get(KEY)
    if given is None:
        return None
    kind = given.get("quant_method") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(kind, str) or kind not in family.quantized:
        said = repr(given)
        why = (
            f"but of {family.model_type} only {' and '.join(family.quantized)} is undone" if family.quantized else "which is not understood"
        )
        return f"{KEY} is {said if len(said) <= 100 else said[:100] + '…'}, {why}"
    for key, value in given.items():
        allowed = (kind,) if key == "quant_method" else KINDS[kind].get(key, ())
        if allowed is not None and value not in allowed:
            return f"{KEY}.{key} is {str(value)[:100]!r}, which is not understood"
    if kind == "fp8" and _block(given) is None:
        return f"{KEY}.weight_block_size is {str(given.get('weight_block_size'))[:100]!r}, but it must be two sizes"
    return None


# Keys of a quantization and their values; None: any, since it says what is quantized, as the stored tensors do, or how activations are.
KINDS: dict[str, dict[str, tuple[Any, ...] | None]] = {
    "mxfp4": {"modules_to_not_convert": None, "dequantize": None, "use_kernels": None},
    "fp8": {
        "fmt": ("e4m3",),
        "activation_scheme": ("dynamic",),
        "weight_block_size": None,
        "modules_to_not_convert": None,
        "scale_fmt": (None, "ue8m0", "float"),
        "dequantize": None,
    },
}


def _block(given: Mapping[str, Any]) -> tuple[int, int] | None:
    size = given.get("weight_block_size", [128, 128])
    fits = isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n < 1 << 20 for n in size)
    return (size[0], size[1]) if fits else None


def dequantized(source: TensorSource, config: Mapping[str, Any], where: str) -> TensorSource:
    """The source with the numbers that its quantized tensors stand for. Raises UsageError for scales that do not fit."""
    given = config.get(KEY)
    if not isinstance(given, Mapping):
        return source
    if given.get("quant_method") == "mxfp4":
        return _checked(Mxfp4(source), where)
    block = _block(given)
    assert block is not None
    return _checked(BlockFp8(source, block), where)


@dataclass(frozen=True)
class Mxfp4:
    """NAME_blocks [E, n, g, 16] and NAME_scales [E, n, g] as the tensor NAME [E, 32·g, n], in bf16, which holds all their values."""

    source: TensorSource

    @cached_property
    def packed(self) -> dict[str, Target]:
        return {n.removesuffix(BLOCKS): t for n, t in self.source.tensors.items() if n.endswith(BLOCKS) and t.dtype == torch.uint8}

    @cached_property
    def tensors(self) -> Mapping[str, Target]:
        rest = {n: t for n, t in self.source.tensors.items() if n.removesuffix(BLOCKS).removesuffix(SCALES) not in self.packed}
        made = {n: Target(n, torch.bfloat16, _unpacked(t.shape)) for n, t in self.packed.items()}
        return {**rest, **made}

    @property
    def stamp(self) -> str:
        return self.source.stamp

    def problem(self) -> str | None:
        for name, blocks in self.packed.items():
            scales = self.source.tensors.get(name + SCALES)
            if len(blocks.shape) != 4 or blocks.shape[-1] != GROUP // 2:
                return f"{name}{BLOCKS} has shape {list(blocks.shape)}, but it must be [experts, rows, groups, {GROUP // 2}]"
            if scales is None or scales.dtype != torch.uint8 or scales.shape != blocks.shape[:-1]:
                there = "is missing" if scales is None else f"has shape {list(scales.shape)}"
                return f"{name}{SCALES} {there}, but {name}{BLOCKS} has shape {list(blocks.shape)}"
        return None

    def read(self, name: str, offset: Sizes, shape: Sizes) -> Tensor:
        if name not in self.packed:
            return self.source.read(name, offset, shape)
        (expert, column, row), (experts, columns, rows) = offset, shape
        first, end = column // GROUP, -(-(column + columns) // GROUP)
        blocks = self.source.read(name + BLOCKS, (expert, row, first, 0), (experts, rows, end - first, GROUP // 2))
        scales = self.source.read(name + SCALES, (expert, row, first), (experts, rows, end - first))
        if (scales == NOT_A_NUMBER).any():
            raise UsageError(f"{name}{SCALES} holds an exponent that stands for no number: get the files again")
        values = unpack_fp4(blocks, scales).flatten(-2)
        return values[..., column - first * GROUP : column - first * GROUP + columns].transpose(1, 2)


def _unpacked(shape: Sizes) -> Sizes:
    return (shape[0], shape[2] * GROUP, shape[1]) if len(shape) == 4 else shape


def unpack_fp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Bytes [..., g, 16], the lower four bits first, and exponents [..., g] → values [..., g, 32] in fp32."""
    halves = torch.stack((blocks & 0x0F, blocks >> 4), -1).flatten(-2)
    values = torch.tensor(FP4)[halves.to(torch.int64)]
    return torch.ldexp(values, (scales.to(torch.int32) - BIAS).unsqueeze(-1))


@dataclass(frozen=True)
class BlockFp8:
    """NAME [n, m] in e4m3 and NAME_scale_inv [⌈n/a⌉, ⌈m/b⌉] as the tensor NAME in bf16; products are made in fp32."""

    source: TensorSource
    block: tuple[int, int]

    @cached_property
    def narrow(self) -> dict[str, Target]:
        return {n: t for n, t in self.source.tensors.items() if t.dtype == torch.float8_e4m3fn}

    @cached_property
    def tensors(self) -> Mapping[str, Target]:
        made = {n: Target(n, torch.bfloat16, t.shape) for n, t in self.narrow.items()}
        return {n: made.get(n, t) for n, t in self.source.tensors.items() if n.removesuffix(INVERSE) not in made or n in made}

    @property
    def stamp(self) -> str:
        return self.source.stamp

    def problem(self) -> str | None:
        for name, weight in self.narrow.items():
            scales = self.source.tensors.get(name + INVERSE)
            want = [-(-n // size) for n, size in zip(weight.shape, self.block)]
            if len(weight.shape) != 2 or scales is None or list(scales.shape) != want:
                there = "is missing" if scales is None else f"has shape {list(scales.shape)}"
                return f"{name}{INVERSE} {there}, but {name} has shape {list(weight.shape)}, which makes it {want}"
        return None

    def read(self, name: str, offset: Sizes, shape: Sizes) -> Tensor:
        if name not in self.narrow:
            return self.source.read(name, offset, shape)
        first = [o // size for o, size in zip(offset, self.block)]
        end = [-(-(o + n) // size) for o, n, size in zip(offset, shape, self.block)]
        scales = self.source.read(name + INVERSE, tuple(first), tuple(b - a for a, b in zip(first, end))).to(torch.float32)
        for dim, (o, n, size, a) in enumerate(zip(offset, shape, self.block, first)):
            scales = scales.index_select(dim, torch.arange(o, o + n) // size - a)
        return self.source.read(name, offset, shape).to(torch.float32) * scales


def _checked(made: Mxfp4 | BlockFp8, where: str) -> TensorSource:
    problem = made.problem()
    if problem is not None:
        raise UsageError(f"{where} cannot be read: {problem}: get the files again")
    return made
