"""Residual schemes as rows: the facts that blocks, rules, growth and formats need. The formulas are in model/residual.py; no torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megascale.plugins import with_plugins

OURS = "megascale.model.residual"


@dataclass(frozen=True)
class ResidualScheme:
    """One scheme: x ← skip·x + branch·F(N(x)) if `norm` is "before", N(skip·x + branch·F(x)) if "after", skip·x + branch·N(F(x)) if
    "within", and skip·x + branch·N'(F(N(x))) if "around". A function may be given as "module:name", imported when a model is built.

    layer        (model, stack, layer) → `model.residual.Residual`: skip, branch and initialization of a block
    ends         model → `model.residual.Ends`: how the stream begins and ends
    inner_norms  norms before the attention's output product and after the feed-forward's activation
    one_norm     attention and feed-forward read the same normalized stream and are added to it together
    two_norms    the same, but each reads the stream behind a norm of its own
    qk_norm      queries and keys are normalized whatever the config says
    unbiased     roles that have no bias whatever the config says
    channel_scales  a learned vector multiplies each branch (the layer's row has its initial value)
    unit_gates   a mixture's output is divided by the root of the sum of its squared gates, so that it is as large as one expert's
    unit_scaled  a matrix starts at unit variance; its product is multiplied by 1/√fan_in instead, forward and backward
    reads        which of mus_tau, branchnorm_period (then required) and deepscale_unit it uses; other schemes refuse them
    grid         blocks over grids support it
    megatron     models with it can be converted to and from Megatron
    """

    norm: Literal["before", "after", "within", "around"]
    layer: str | Callable[..., Any]
    ends: str | Callable[..., Any] = f"{OURS}:constant_ends"
    inner_norms: bool = False
    one_norm: bool = False
    two_norms: bool = False
    qk_norm: bool = False
    unbiased: tuple[str, ...] = ()
    channel_scales: bool = False
    unit_gates: bool = False
    unit_scaled: bool = False
    reads: tuple[str, ...] = ()
    grid: bool = False
    megatron: bool = False

    @property
    def together(self) -> bool:
        """Whether the feed-forward reads the stream that entered the block, without what attention adds to it."""
        return self.one_norm or self.two_norms

    @property
    def final_norm(self) -> bool:
        """Whether there is a norm before the head. If norms come after the sum, the last block already ends with one."""
        return self.norm != "after"


# Sources: res_post Swin V2, arXiv 2111.09883, and OLMo 2, 2501.00656; sandwich CogView, 2105.13290, and Gemma 2, 2408.00118; DeepNorm
# 2203.00555, BranchNorm 2305.02790, DeepScaleLM 2403.09635, SubLN 2210.06423, LayerScale 2103.17239, parallel blocks 2302.05442, those of
# GPT-NeoX 2204.06745, μS (μnit Scaling) 2502.05967.
DEEPSCALE: dict[str, Any] = {
    "layer": f"{OURS}:deepscale_layer",
    "ends": f"{OURS}:deepscale_ends",
    "unit_gates": True,
    "reads": ("deepscale_unit",),
}
RESIDUALS: dict[str, ResidualScheme] = {
    "pre": ResidualScheme("before", f"{OURS}:scaled_writers", grid=True, megatron=True),
    "post": ResidualScheme("after", f"{OURS}:constant_starts", grid=True),
    "res_post": ResidualScheme("within", f"{OURS}:constant_starts"),
    "sandwich": ResidualScheme("around", f"{OURS}:constant_starts"),
    "deepnorm": ResidualScheme("after", f"{OURS}:deepnorm_layer"),
    "branchnorm": ResidualScheme("after", f"{OURS}:branchnorm_layer", reads=("branchnorm_period",)),
    "deepscale": ResidualScheme("before", **DEEPSCALE),
    "deepscale_post": ResidualScheme("after", **DEEPSCALE),
    "subln": ResidualScheme("before", f"{OURS}:subln_layer", inner_norms=True),
    "layerscale": ResidualScheme("before", f"{OURS}:layerscale_layer", channel_scales=True),
    "parallel": ResidualScheme("before", f"{OURS}:scaled_writers", one_norm=True, qk_norm=True, unbiased=("query", "key", "value", "norm")),
    "neox": ResidualScheme("before", f"{OURS}:scaled_writers", two_norms=True),
    "mus": ResidualScheme("within", f"{OURS}:mus_layer", f"{OURS}:mus_ends", unit_scaled=True, reads=("mus_tau",)),
}


def residuals() -> Mapping[str, ResidualScheme]:
    return with_plugins("residuals", RESIDUALS, ResidualScheme)
