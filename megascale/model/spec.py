"""Declares what a parameter is, once where it is made; initialization, tensor parallelism, optimizer groups, checkpoints and the dry run
read it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import nn

# The role of a weight. Optimizers and schemes choose by role, never by name.
# "scale": a learned factor per channel or overall; "coefficient": a factor that is not learned; "head_gate": a product with one number per
# head.
Role = Literal[
    "embedding",
    "position",
    "relative",
    "head",
    "norm",
    "bias",
    "scale",
    "coefficient",
    "query",
    "key",
    "value",
    "attention_out",
    "up",
    "gate",
    "down",
    "router",
    "head_gate",
]

# The roles of hidden matrices, whose rate follows the width under unit scaling. Muon orthogonalizes them, except for routers.
MATRICES: tuple[Role, ...] = ("query", "key", "value", "attention_out", "up", "gate", "down")

# How tensor parallelism treats a weight. A number is the dimension along which it is split. "tokens": every rank has all of it and applies
# it to its tokens, so with tokens split over ranks its gradient is a partial sum. "heads": every rank has all of it and applies it to its
# own heads only, so its gradient is always a partial sum. "kv_heads": split along dimension 0 if there are KV heads for all ranks, else
# like "heads".
Cut = int | Literal["tokens", "heads", "kv_heads"]


@dataclass(frozen=True)
class ParamSpec:
    """One weight: unsharded `shape`, `role`, how tensor parallelism splits it, and initial values: normal, deviation `std`, mean `mean`.

    truncated   truncated at two standard deviations
    orthogonal  initialized as a random matrix with orthonormal rows or columns, whichever are fewer, instead of a normal one; needs
                equal_rows
    law         instead of a normal one, a distribution of model/init.py: LAWS
    equal_rows  initial rows are all scaled to the length std·√columns
    experts     dimension 0 counts experts, which expert parallelism splits
    uses        uses of an element per token: below one in a bank of experts, several if layers repeat
    """

    shape: tuple[int, ...]
    role: Role
    cut: Cut
    std: float = 0.0
    mean: float = 0.0
    truncated: bool = False
    orthogonal: bool = False
    equal_rows: bool = False
    experts: bool = False
    uses: float = 1.0
    law: Literal["decay", "step"] | None = None

    @property
    def decays(self) -> bool:
        """Weight decay is for matrices: not for norms, biases and learned factors."""
        return self.role not in ("norm", "bias", "scale")

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


class SpecParameter(nn.Parameter):
    """A meta-device parameter that remembers its spec until the passes have read it."""

    spec: ParamSpec


class SpecState(torch.Tensor):
    """A meta-device buffer that remembers its spec."""

    spec: ParamSpec


def declare(spec: ParamSpec, dtype: torch.dtype) -> nn.Parameter:
    """A parameter on the meta device: with shape and dtype, but without memory."""
    parameter = nn.Parameter(torch.empty(spec.shape, dtype=dtype, device="meta"))
    cast(SpecParameter, parameter).spec = spec
    return parameter


def declare_repeated(module: nn.Module, times: int) -> None:
    """Marks the weights of `module` as used `times` times per token."""
    for parameter in module.parameters():
        spec = cast(SpecParameter, parameter).spec
        cast(SpecParameter, parameter).spec = replace(spec, uses=spec.uses * times)


def declare_state(module: nn.Module, name: str, spec: ParamSpec, dtype: torch.dtype) -> None:
    """Gives `module` a buffer on the meta device that is initialized by its spec and saved in checkpoints, but has neither gradient nor
    optimizer state: coefficients of a layer, a router's bias. Every rank with the layer holds all of it, with equal values.
    """
    module.register_buffer(name, torch.empty(spec.shape, dtype=dtype, device="meta"))
    cast(SpecState, module.get_buffer(name)).spec = spec


def states_of(model: nn.Module) -> dict[str, ParamSpec]:
    """Canonical name → spec of what `declare_state` declared in a freshly built model."""
    return {name: cast(SpecState, b).spec for name, b in model.named_buffers() if hasattr(b, "spec")}


def specs_of(model: nn.Module) -> dict[str, ParamSpec]:
    """Canonical name → spec of a freshly built model. A tied weight appears once, under its first name."""
    return {name: cast(SpecParameter, p).spec for name, p in model.named_parameters()}


def active_parameters(specs: dict[str, ParamSpec]) -> int:
    """The parameters that one token uses: of a bank of experts only the chosen ones."""
    return round(sum(s.numel * min(1.0, s.uses) for s in specs.values()))
