"""Norms as rows: what models, rules, growth, formats and theory ask of them. The functions are in model/norms.py, and no torch is needed
here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megascale.plugins import with_plugins


@dataclass(frozen=True)
class NormGrowth:
    """How a norm keeps its function when its input gets more channels.

    power   it divides by (mean of |x|^power + ε)^(1/power), so that gains and epsilons make up for zeros or copies among its channels;
            None: it takes each channel alone and leaves a zero a zero, so that nothing has to be made up for
    behind  why no inserted layer with this norm behind its sum leaves the stream as it is; None: a chain of them can (expand/depth.py)
    """

    power: float | None
    behind: str | None = None

    def __post_init__(self) -> None:
        if self.power is not None and not 0 < self.power < float("inf"):
            raise ValueError(f"the power of a norm's growth is {self.power}: give a positive number, or None")

    def gain(self, share: float) -> float:
        """What its gains are multiplied with where this share of the channels is as it was, and the others are zero."""
        return 1.0 if self.power is None else share ** (1 / self.power)

    def eps(self, gain: float) -> float:
        """What its epsilon is multiplied with beside such a gain."""
        return 1.0 if self.power is None else gain**self.power


@dataclass(frozen=True)
class NormRow:
    """One norm. A function may be given as "module:name", which is imported where a model is built.

    normalize  (x, mean, eps) → x normalized, without gain and bias. Statistics over channels are taken by `mean` alone, a function of
               [..., channels] → [..., 1], so that the norm works where its channels are cut over ranks
    kernel     (x, weight, bias, eps) → the whole norm, faster where no channel is elsewhere; None: written out with `normalize`
    fused      run.kernels (apex, te) → module and function of another package that may stand for `kernel`
    bias       it has a bias where model.bias is set
    centres    it subtracts the mean over the channels
    divides    it takes the size of its input away, so that its output has unit mean square; where not, the embedding's size is learned
    scale      its input is multiplied with a learned number, which starts at model.dyt_alpha
    growth     None: it does not say, and models with it keep their sizes
    megatron   its name in megatron-core; None: weights of models with it are not exchanged with Megatron
    theory     by which rule of analysis/moments.py its output is predicted; None: by none
    """

    normalize: str | Callable[..., Any]
    kernel: str | Callable[..., Any] | None = None
    fused: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    bias: bool = True
    centres: bool = False
    divides: bool = True
    scale: bool = False
    growth: NormGrowth | None = None
    megatron: str | None = None
    theory: Literal["norm", "tanh"] | None = None

    @property
    def plain(self) -> bool:
        """It fixes the size of the stream and has no learned number of its own."""
        return self.divides and not self.scale


OURS = "megascale.model.norms"
# apex: `fused_rms_norm_affine(x, weight, normalized_shape, eps)` and `fused_layer_norm_affine(x, weight, bias, normalized_shape, eps)`;
# Transformer Engine has modules only, so their functional form is used (model/ops/norm_kernels.py).
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
        growth=NormGrowth(None, "tanh of tanh is no tanh"),
        theory="tanh",
    ),
}


def norms() -> Mapping[str, NormRow]:
    return with_plugins("norms", NORMS, NormRow)
