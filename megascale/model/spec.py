"""What a parameter is, said once where it is made; everything else reads it: initialization, tensor parallelism, optimizer groups,
checkpoints and the dry run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import nn

# What a weight does. Optimizers and schemes choose by role, never by name.
# "scale": a learned factor on a channel or on everything; "coefficient": a factor that is not learned.
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
]

# How tensor parallelism treats a weight. A number is the dimension it is cut along. "tokens": every rank holds all of it and applies it to
# the tokens it has, so with tokens cut over ranks its gradient is a partial sum. "heads": every rank holds all of it and applies it to its
# own heads only, so its gradient is a partial sum always. "kv_heads": cut along dimension 0 where there are KV heads for all ranks, else
# like "heads".
Cut = int | Literal["tokens", "heads", "kv_heads"]


@dataclass(frozen=True)
class ParamSpec:
    """One weight: unsharded `shape`, `role`, how tensor parallelism cuts it, and its start: normal of deviation `std` around `mean`.

    truncated   the start keeps to two deviations
    orthogonal  the start is a random matrix with orthonormal rows or columns, whichever are fewer, instead of a normal one;
                needs equal_rows
    equal_rows  the start's rows are all brought to the length std·√columns
    experts     dimension 0 counts experts, which expert parallelism cuts
    uses        how often a token meets an element of it: less than once in a bank of experts, several times where layers repeat
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
    """A parameter on the meta device: it has a shape and a dtype and costs nothing."""
    parameter = nn.Parameter(torch.empty(spec.shape, dtype=dtype, device="meta"))
    cast(SpecParameter, parameter).spec = spec
    return parameter


def declare_repeated(module: nn.Module, times: int) -> None:
    """A token passes `module` several times: its weights are used as often."""
    for parameter in module.parameters():
        spec = cast(SpecParameter, parameter).spec
        cast(SpecParameter, parameter).spec = replace(spec, uses=spec.uses * times)


def declare_state(module: nn.Module, name: str, spec: ParamSpec, dtype: torch.dtype) -> None:
    """Gives `module` a buffer on the meta device that starts as its spec says and belongs to checkpoints, but has neither gradient nor
    optimizer state: coefficients of a layer, a router's bias. Every rank that holds the layer holds all of it, with equal values.
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
    """The parameters that one token meets: of a bank of experts those that it chooses."""
    return round(sum(s.numel * min(1.0, s.uses) for s in specs.values()))
