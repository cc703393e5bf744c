"""How a sublayer joins the residual stream, as a table: (scheme, depth, architecture, layer) → factors on skip and branch, and the
initialization of weights by role.

Blocks read the row; the scheme says where norms are placed (config/residuals.py, which has the sources). Everything here is plain numbers:
N blocks of an encoder, M of a decoder, L of either, d hidden width, p dropout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from megascale.config.residuals import ResidualScheme
from megascale.config.schema import BLOCK_NORMS, Model
from megascale.plugins import resolve

# The roles that a branch is linear in. Published gains apply to these; query and key keep gain 1.
BRANCH = ("value", "attention_out", "up", "down")

Side = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Stack:
    """A stack of blocks as schemes need it: its `layers`, and the layers of its `partner` stack in an encoder–decoder (0: none).

    cross_input  its blocks cross-attend to an external input (a text) instead of a partner stack
    """

    side: Side
    layers: int
    partner: int = 0
    cross_input: bool = False

    @property
    def sublayers(self) -> tuple[str, ...]:
        """The sublayers of one block, in order; a decoder with an encoder also attends to its output."""
        return ("attention", "cross", "ffn") if self.cross_input or (self.side == "decoder" and self.partner) else ("attention", "ffn")


@dataclass(frozen=True)
class InitStd:
    """Normal initialization of a block's matrices: a unit by `rule`, times a gain by role (default 1).

    constant  `unit` for every matrix
    xavier    √(2/(in + out)) of the matrix's own shape
    fan_in    √(1/in)
    """

    rule: Literal["constant", "xavier", "fan_in"]
    unit: float = 1.0
    gains: Mapping[str, float] = field(default_factory=dict)

    def std(self, role: str, out_dim: int, in_dim: int) -> float:
        """The standard deviation of a matrix [out_dim, in_dim]."""
        match self.rule:
            case "constant":
                unit = self.unit
            case "xavier":
                unit = math.sqrt(2 / (in_dim + out_dim))
            case "fan_in":
                unit = math.sqrt(1 / in_dim)
        return unit * self.gains.get(role, 1.0)


@dataclass(frozen=True)
class Residual:
    """One row: a block of a scheme.

    starts         initialization of the block's matrices
    cross          initialization of the cross-attention's matrices, if it differs
    branch_period  the branch is also multiplied by min(1, step/period), steps counted from 1
    channel_scale  the branch is also multiplied by a learned vector with this initial value
    norm_eps       by the norm's name in its block or attention
    """

    scheme: ResidualScheme
    starts: InitStd
    cross: InitStd | None = None
    skip: float = 1.0
    branch: float = 1.0
    branch_period: int | None = None
    channel_scale: float | None = None
    norm_eps: Mapping[str, float] = field(default_factory=dict)

    def product_scale(self, in_dim: int) -> float:
        """The factor on a matrix's product."""
        return 1 / math.sqrt(in_dim) if self.scheme.unit_scaled else 1.0


@dataclass(frozen=True)
class Ends:
    """The two ends of the stream: standard deviations of the tables, a factor on the last hidden state, and the initial value of a learned
    scalar on the embedding, if there is one.
    """

    embedding: float
    head: float
    hidden_factor: float = 1.0
    embedding_scale: float | None = None


def residual(cfg: Model, stack: Stack, layer: int) -> Residual:
    """The row for block `layer` (from 0) of a stack: the scheme's row, with the layer's own coefficients and epsilons."""
    of_layer = resolve(cfg.residual_row.layer, f"the residual scheme {cfg.residual}")
    row: Residual = replace(of_layer(cfg, stack, layer), norm_eps={name: cfg.eps_of(name, layer) for name in BLOCK_NORMS})
    if cfg.layer_coefficients is None:
        return row
    skip, branch = cfg.layer_coefficients[layer]
    return replace(row, skip=skip, branch=branch)


def ends(cfg: Model) -> Ends:
    """The scheme's ends, adjusted by the config and the norm. If the norm does not fix the size of the stream, the embedding's is learned
    (DyT, arXiv 2503.10622, appendix).
    """
    own: Ends = resolve(cfg.residual_row.ends, f"the residual scheme {cfg.residual}")(cfg)
    learned = None if cfg.norm_row.divides else math.sqrt(cfg.hidden_size)
    return replace(own, hidden_factor=cfg.head_scale or own.hidden_factor, embedding_scale=learned)


def constant_starts(cfg: Model, stack: Stack, layer: int) -> Residual:
    return Residual(cfg.residual_row, InitStd("constant", cfg.init_std))


def scaled_writers(cfg: Model, stack: Stack, layer: int) -> Residual:
    """Scales each write into a pre-norm stream so that the sum of all is as large as one (GPT-2, section 2.3)."""
    width, depth = (None, None) if cfg.init_base is None else (cfg.init_base.width, cfg.init_base.depth)
    writer = 1 / math.sqrt(len(stack.sublayers) * (depth or stack.layers))
    std = cfg.init_std if width is None else cfg.init_std * math.sqrt(width / cfg.hidden_size)
    return Residual(cfg.residual_row, InitStd("constant", std, {"attention_out": writer, "down": writer}))


def deepnorm_layer(cfg: Model, stack: Stack, layer: int) -> Residual:
    alpha, beta = deepnorm(stack)
    return Residual(cfg.residual_row, InitStd("xavier", gains=dict.fromkeys(BRANCH, beta)), skip=alpha)


def branchnorm_layer(cfg: Model, stack: Stack, layer: int) -> Residual:
    return Residual(cfg.residual_row, InitStd("xavier"), branch_period=cfg.branchnorm_period)


def deepscale_layer(cfg: Model, stack: Stack, layer: int) -> Residual:
    skip, branch = deepscale(stack)
    starts = InitStd("fan_in", gains=deepscale_gains(cfg, stack, layer))
    cross = InitStd("fan_in", gains=deepscale_memory_gains(cfg, stack)) if "cross" in stack.sublayers else None
    return Residual(cfg.residual_row, starts, cross, skip, branch)


def subln_layer(cfg: Model, stack: Stack, layer: int) -> Residual:
    return Residual(cfg.residual_row, InitStd("xavier", gains=dict.fromkeys(BRANCH, subln(stack))))


def layerscale_layer(cfg: Model, stack: Stack, layer: int) -> Residual:
    return Residual(cfg.residual_row, InitStd("constant", cfg.init_std), channel_scale=layerscale(stack.layers))


def mus_layer(cfg: Model, stack: Stack, layer: int) -> Residual:
    tau = mus_tau(cfg, stack)
    return Residual(cfg.residual_row, InitStd("constant", 1.0), skip=math.sqrt(1 - tau), branch=math.sqrt(tau))


def constant_ends(cfg: Model) -> Ends:
    return Ends(cfg.init_std, cfg.init_std)


def mus_ends(cfg: Model) -> Ends:
    return Ends(math.sqrt(1 / _tables(cfg)), 1.0, 1 / cfg.hidden_size)


def deepscale_ends(cfg: Model) -> Ends:
    d, embedding = cfg.hidden_size, math.sqrt((1 - cfg.dropout) / _tables(cfg))
    return Ends(embedding, 1 / math.sqrt(d), 1 / (embedding * math.sqrt(d)) if cfg.tie_embeddings else 1.0)


def _tables(cfg: Model) -> int:
    """The number of tables whose rows add up to a token's embedding."""
    return 2 if cfg.position_row.table else 1


def deepnorm(stack: Stack) -> tuple[float, float]:
    """(α, β) of DeepNorm's table (arXiv 2203.00555, figure 2). TorchScale uses 1.15 for the encoder of a pair; the paper has 0.87."""
    layers, other = stack.layers, stack.partner
    if not other:
        return (2 * layers) ** 0.25, (8 * layers) ** -0.25
    if stack.side == "encoder":
        size = (layers**4 * other) ** (1 / 16)
        return 0.81 * size, 0.87 / size
    return (3 * layers) ** 0.25, (12 * layers) ** -0.25


def subln(stack: Stack) -> float:
    """The gain of SubLN's table (arXiv 2210.06423, figure 2)."""
    if not stack.partner:
        return math.sqrt(math.log(2 * stack.layers))
    if stack.side == "encoder":
        return math.sqrt(math.log(3 * stack.partner) * math.log(2 * stack.layers) / 3)
    return math.sqrt(math.log(3 * stack.layers))


def layerscale(layers: int) -> float:
    """Initial γ (arXiv 2103.17239, section 2.2)."""
    return 0.1 if layers <= 18 else 1e-5 if layers <= 24 else 1e-6


def mus_tau(cfg: Model, stack: Stack) -> float:
    """τ of μS, the branch's share of the stream's variance: fixed for a run, smaller for deep models (0.4 for four blocks, 0.1 for deep
    ones; the rule in between is ours).
    """
    return cfg.mus_tau or min(0.4, max(0.1, 0.8 / math.sqrt(stack.layers)))


def deepscale(stack: Stack) -> tuple[float, float]:
    """(λ, β) with λ² + β² = 1 and β² = 2 ÷ (number of sublayers)."""
    beta = math.sqrt(2 / (len(stack.sublayers) * stack.layers))
    return math.sqrt(1 - beta**2), beta


def deepscale_gains(cfg: Model, stack: Stack, layer: int) -> dict[str, float]:
    """Gains on √(1/in) that give every branch unit variance and unit gradient, whatever the correlations in its input.

    Averaging over tokens reduces a value's variance to its token correlation r, so value and output share √((1−p)/r). The feed-forward's
    two matrices share (1−p)·d/(f·E[φ²]) evenly if φ is homogeneous in `up`; GELU needs an input of unit variance, so `down` takes it all.
    SwiGLU cannot have both units: `cfg.deepscale_unit` chooses.
    """
    keep, row = 1 - cfg.dropout, cfg.ffn_row
    moment = row.second_moment if cfg.deepscale_unit == "variance" else row.gradient_moment
    at = len(stack.sublayers) * layer
    r = token_correlations(stack.sublayers * stack.layers, cfg.dropout, cfg.token_correlation)[at]
    attention = (keep / r) ** 0.25
    if not row.homogeneous:
        up, down = 1.0, math.sqrt(keep / moment)
    else:
        ratio = cfg.hidden_size / cfg.ffn_size
        up, down = (keep * ratio / moment) ** 0.25, (keep / (ratio * moment)) ** 0.25
    return {"value": attention, "attention_out": attention, "up": up, "down": down}


def deepscale_memory_gains(cfg: Model, stack: Stack) -> dict[str, float]:
    """The same for cross-attention, which averages tokens from the partner's last block."""
    r = token_correlations(("attention", "ffn") * stack.partner, cfg.dropout, cfg.token_correlation)[-1]
    return dict.fromkeys(("value", "attention_out"), ((1 - cfg.dropout) / r) ** 0.25)


@lru_cache(maxsize=16)
def token_correlations(sublayers: tuple[str, ...], dropout: float, start: float) -> tuple[float, ...]:
    """The correlation of two tokens' vectors before each sublayer of a DeepScaleLM stack, and after the last.

    `start` is that of embeddings without dropout: the chance that two tokens are the same (0.221 for English text, weakly sourced for
    others).
    """
    beta2 = 2 / len(sublayers)
    r = start * (1 - dropout)
    found = [r]
    for kind in sublayers:
        if kind == "ffn":
            out = (1 - dropout) * (r + (math.sqrt(1 - r * r) - r * math.acos(r)) / math.pi)
        else:
            out = 1 - dropout
        r = min(1.0, (1 - beta2) * r + beta2 * out)
        found.append(r)
    return tuple(found)
