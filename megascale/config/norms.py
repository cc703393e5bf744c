"""Norms as rows: the facts that models, rules, growth, formats and theory need. The functions are in model/norms.py. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megascale.plugins import with_plugins


@dataclass(frozen=True)
class NormGrowth:
    """How a norm keeps its function when its input gets more channels.

    power   it divides by (mean of |x|^power + ε)^(1/power), so gains and epsilons can make up for new zeros or copies among its channels;
            None: it acts on each channel alone and maps 0 to 0, so there is nothing to make up for
    behind  for norms after the residual sum: why no inserted layer leaves the stream unchanged; None: a chain can (expand/depth.py)
    """

    power: float | None
    behind: str | None = None

    def __post_init__(self) -> None:
        if self.power is not None and not 0 < self.power < float("inf"):
            raise ValueError(f"the power of a norm's growth is {self.power}: give a positive number, or None")

    def gain(self, share: float) -> float:
        """Factor on its gains when this share of the channels is kept and the rest are zero."""
        return 1.0 if self.power is None else share ** (1 / self.power)

    def eps(self, gain: float) -> float:
        """Factor on its epsilon that goes with such a factor on its gains."""
        return 1.0 if self.power is None else gain**self.power


@dataclass(frozen=True)
class NormRow:
    """One norm. A function may be given as "module:name", imported when a model is built.

    normalize  (x, mean, eps) → x normalized, without gain and bias. It reduces over channels only by `mean`, a function
               [..., channels] → [..., 1], so the norm also works when channels are sharded over ranks
    kernel     (x, weight, bias, eps) → the whole norm, a faster form for unsharded channels; None: use `normalize`
    fused      run.kernels (apex, te) → (module, function) of another package that replaces `kernel`
    bias       it has a bias under model.bias
    centres    it subtracts the mean over the channels
    offset     the weight is the gain minus this number: weight decay then pulls the gain to it
    divides    its output has unit mean square whatever the size of the input; if not, the size of the embedding is learned
    scale      a learned factor multiplies its input, initially model.dyt_alpha
    growth     None: unknown; models with it cannot grow
    megatron   its name in megatron-core; None: models with it cannot be converted to or from Megatron
    theory     the rule of analysis/moments.py that predicts its output; None: no rule does
    """

    normalize: str | Callable[..., Any]
    kernel: str | Callable[..., Any] | None = None
    fused: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    bias: bool = True
    centres: bool = False
    offset: float = 0.0
    divides: bool = True
    scale: bool = False
    growth: NormGrowth | None = None
    megatron: str | None = None
    theory: Literal["norm", "tanh"] | None = None

    @property
    def plain(self) -> bool:
        """It normalizes the size of the stream and has no learned factor of its own."""
        return self.divides and not self.scale


OURS = "megascale.model.norms"
# apex: `fused_rms_norm_affine(x, weight, normalized_shape, eps)` and `fused_layer_norm_affine(x, weight, bias, normalized_shape, eps)`;
# Transformer Engine has only modules; model/ops/norm_kernels.py calls their functional form.
APEX, TE = "apex.normalization.fused_layer_norm", "transformer_engine.pytorch"
NORMS: dict[str, NormRow] = {
    "rmsnorm": NormRow(
        f"{OURS}:rms_normalized",
        f"{OURS}:rmsnorm",
        {"apex": (APEX, "fused_rms_norm_affine"), "te": (TE, "RMSNorm")},
        bias=False,
        growth=NormGrowth(2.0),
        megatron="RMSNorm",
        theory="norm",
    ),
    # Zero-centred: a gain of 1 + weight (Gemma, Qwen3-Next).
    "rmsnorm_1p": NormRow(f"{OURS}:rms_normalized", f"{OURS}:rmsnorm", bias=False, offset=1.0, growth=NormGrowth(2.0), theory="norm"),
    "layernorm": NormRow(
        f"{OURS}:layer_normalized",
        f"{OURS}:layernorm",
        {"apex": (APEX, "fused_layer_norm_affine"), "te": (TE, "LayerNorm")},
        centres=True,
        growth=NormGrowth(2.0),
        megatron="LayerNorm",
        theory="norm",
    ),
    "dyt": NormRow(
        f"{OURS}:tanh_of",
        f"{OURS}:tanh",
        divides=False,
        scale=True,
        growth=NormGrowth(None, "tanh of tanh is not a tanh"),
        theory="tanh",
    ),
}


def norms() -> Mapping[str, NormRow]:
    return with_plugins("norms", NORMS, NormRow)
