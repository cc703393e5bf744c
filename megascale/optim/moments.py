"""Number formats of an optimizer's moments. A moment is opened wide for an update and closed again, in its own format.

`int8` is block-wise dynamic quantization (Dettmers et al., arXiv 2110.02861): a code for each element and a scale for each block, which is
the largest size in it. Blocks lie within rows, where no layout cuts them, so that every layout rounds alike. As published, vectors,
embeddings and routers keep whole numbers.

bf16 rounds to nearest. A moment that decays by less than half a spacing would never decay, so betas are bounded (config/rules). Stochastic
rounding would lift the bound, but its draws would have to follow elements over all layouts.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from megascale.config.optimizers import block_of
from megascale.errors import UsageError
from megascale.model.spec import MATRICES
from megascale.parallel.model import Weight


class Moment(Protocol):
    """One moment of one weight. `tensors`: what it keeps, by the suffix of its key in the state."""

    tensors: dict[str, Tensor]

    def open(self) -> Tensor:
        """The values, to be changed in place."""

    def close(self, values: Tensor) -> None:
        """Keeps what `open` gave."""


class Wide:
    """In the weight's own format."""

    def __init__(self, like: Tensor) -> None:
        self.tensors = {"": torch.zeros_like(like)}

    def open(self) -> Tensor:
        return self.tensors[""]

    def close(self, values: Tensor) -> None:
        """They are the moment itself."""


class Narrow:
    def __init__(self, like: Tensor) -> None:
        self.dtype = like.dtype
        self.tensors = {"": torch.zeros_like(like, dtype=torch.bfloat16)}

    def open(self) -> Tensor:
        return self.tensors[""].to(self.dtype)

    def close(self, values: Tensor) -> None:
        self.tensors[""].copy_(values)


class Blocks:
    """Codes in 8 bits. `signed`: a first moment; of a second one, no value other than zero becomes zero, since a step divides by it."""

    def __init__(self, like: Tensor, block: int, signed: bool) -> None:
        self.dtype, self.block, self.signed = like.dtype, block, signed
        codes = torch.full_like(like, code_of_zero(signed), dtype=torch.uint8)
        scales = torch.zeros(*like.shape[:-1], like.shape[-1] // block, dtype=torch.float32, device=like.device)
        self.tensors = {"": codes, "_scale": scales}

    def open(self) -> Tensor:
        values = code_values(self.signed).to(self.tensors[""].device, non_blocking=True)[self.tensors[""].to(torch.int64)]
        return (self._blocks(values) * self.tensors["_scale"].unsqueeze(-1)).flatten(-2).to(self.dtype)

    def close(self, values: Tensor) -> None:
        blocks = self._blocks(values.to(torch.float32))
        # With its sign, so that this element's code is exactly 1, and reading and writing again changes nothing: a bad step does so.
        scales = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        shares = (blocks / scales.where(scales != 0, torch.ones_like(scales))).flatten(-2)
        table = code_values(self.signed).to(values.device, non_blocking=True)
        codes = torch.bucketize(shares, (table[1:] + table[:-1]) / 2)
        if not self.signed:
            codes = torch.where(shares > 0, codes.clamp(min=1), codes)
        self.tensors[""].copy_(codes)
        self.tensors["_scale"].copy_(scales.squeeze(-1))

    def _blocks(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.block))


def moment_of(w: Weight, kind: str | None, signed: bool) -> Moment:
    """A moment of a weight, zero, in `optim.moments`. Raises UsageError if this rank's part cuts blocks."""
    if kind == "bf16":
        return Narrow(w.local)
    if kind is None or w.placement.spec.role not in MATRICES:
        return Wide(w.local)
    columns, here = w.placement.spec.shape[-1], w.local.shape[-1]
    block = block_of(columns)
    if here % block:
        raise UsageError(
            f"optim.moments is int8, and a rank holds {here} of the {columns} columns of {w.name}, which cuts its blocks of {block}: use "
            "fewer tensor-parallel ranks (parallel.tp, etp), or optim.moments bf16"
        )
    return Blocks(w.local, block, signed)


@cache
def code_values(signed: bool) -> Tensor:
    """The 256 values of the dynamic format, ascending: 7 decades up to 1, each with twice as many steps as the one below."""
    values = [0.0, 1.0]
    for decade in range(7):
        steps = 2**decade * (1 if signed else 2)
        edges = torch.linspace(0.1, 1.0, steps + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += [*middles, *(-x for x in middles)] if signed else middles
    return torch.tensor(sorted(values), dtype=torch.float64).to(torch.float32)


def code_of_zero(signed: bool) -> int:
    return int((code_values(signed) == 0).nonzero())
