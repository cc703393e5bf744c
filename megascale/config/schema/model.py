"""The sections `model` and below it."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megascale.config.activations import ActivationRow, activations
from megascale.config.attentions import AttentionRow, attentions
from megascale.config.norms import NormRow, norms
from megascale.config.positions import PositionRow, positions
from megascale.config.residuals import ResidualScheme, residuals
from megascale.config.routers import RouterRow, routers
from megascale.config.schema.row_name import RowName
from megascale.config.schema.section import Filled, Layers, NonNegative, Positive, Section, Share

# Norms by the names in `model.norm_eps_of`: outside blocks, and in each block (qk_norm and the inner norms belong to its sublayers).
OUTER_NORMS = ("embedding_norm", "final_norm", "mlm_norm")
BLOCK_NORMS = ("attention_norm", "cross_norm", "ffn_norm", "qk_norm", "attention_inner_norm", "ffn_inner_norm")


class Moe(Section):
    num_experts: Positive = 8
    """Routed experts per layer."""
    top_k: Positive = 2
    """Experts that each token is sent to."""
    num_shared: NonNegative = 0
    """Shared experts that every token passes through, built as one expert of `num_shared` times the width."""
    ffn_size: Positive | None = None
    """Width of one expert. Default: `model.ffn_size`."""
    every: Positive = 1
    """Every n-th layer has experts; the others are dense."""
    router: Annotated[str, RowName(routers)] = "topk_softmax"
    """How scores become choices and weights: softmax over the chosen or over all experts, sigmoid scores, SIGMA, or X-MoE's cosine scores.
    """
    balance: Literal["loss", "entropy", "bias", "none"] = "loss"
    """How load is balanced: an auxiliary loss, an entropy loss, router biases without a loss, or not at all."""
    aux_loss: Annotated[float, Field(ge=0)] = 1e-2
    """Weight of the balance or entropy loss."""
    z_loss: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the router's z-loss, the squared log-sum-exp of its scores."""
    bias_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Change of a router bias per step under `balance: bias`."""
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    """Largest load of an expert per sequence, as a multiple of an even load; tokens beyond it are dropped. Absent: no token is dropped."""
    eval_capacity_factor: Annotated[float, Field(gt=0)] = 2.0
    """The same in evaluation, if `capacity_factor` is set."""
    init: Literal["model", "st_moe"] = "model"
    """Initial weights of the experts: as the rest of the model, or ST-MoE's truncated normal of variance 0.1/fan_in."""

    @property
    def router_row(self) -> RouterRow:
        return routers()[self.router]


class Moeut(Section):
    """Layers in groups whose weights repeat in depth, with experts in attention as well as those of `moe` (arXiv 2405.16039)."""

    group_size: Positive = 2
    """Layers with weights of their own; the group repeats through the depth."""
    attention_experts: Positive = 8
    """Experts for the values and for the output of each head."""
    attention_top_k: Positive = 2
    """Attention experts that each token uses per head."""
    attention_aux_loss: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the attention experts' entropy loss."""


class RopeScaling(Section):
    """How rotary wavelengths are stretched by `factor` for a context longer than the model's first one, `original_seq_len`."""

    type: Literal["llama3", "linear", "yarn"] = "llama3"
    """Which wavelengths are stretched: `llama3`, long ones alone; `linear`, all of them (position interpolation, arXiv 2306.15595); `yarn`,
    those with few turns in the original context; `attention_factor` then multiplies cosines and sines (arXiv 2309.00071).
    """
    factor: Annotated[float, Field(gt=0)]
    """How much longer the context becomes: the new length divided by the original one."""
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    """`llama3`: wavelengths longer than `original_seq_len / low_freq_factor` are stretched in full."""
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    """`llama3`: wavelengths shorter than `original_seq_len / high_freq_factor` are kept."""
    original_seq_len: Positive = 8192
    """Context length in tokens that the model was first trained with."""
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    """`yarn`: frequencies with more turns than this over the original context are kept."""
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    """`yarn`: frequencies with fewer turns than this over the original context are stretched in full."""
    attention_factor: Annotated[float, Field(gt=0)] | None = None
    """`yarn`: factor on cosines and sines. Default: 0.1·ln(factor) + 1."""

    @property
    def amplitude(self) -> float:
        """Factor on cosines and sines."""
        if self.type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 1.0 if self.factor <= 1.0 else 0.1 * math.log(self.factor) + 1.0


class Spacetime(Section):
    """Fields of numbers on a grid, [s₁ … s_K, channels] per sample: video, weather, volumes. Each patch of the grid is a token."""

    shape: Annotated[tuple[Positive, ...], Field(max_length=8)]
    """Lengths of a sample along each dimension; the first dimension is time if there is one."""
    patch: Annotated[tuple[Positive, ...], Field(max_length=8)]
    """Lengths of a patch, which becomes one token, along each dimension. They must divide `shape`."""
    channels: Positive
    """Numbers per grid point."""
    objective: Literal["masked", "next_step"] = "masked"
    """Training objective: fill in hidden patches, or predict the next patch in time from the past."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of patches that `objective: masked` hides."""
    text_len: Positive | None = None
    """Tokens of a text that accompanies each sample and that every block attends to. Absent: no text."""
    text_vocab_size: Positive | None = None
    """Vocabulary size of that text. Default: from the tokenizer next to `PREFIX.text`."""

    @model_validator(mode="after")
    def _fits(self) -> Spacetime:
        if len(self.shape) < 2 or len(self.patch) != len(self.shape) or any(n % p for n, p in zip(self.shape, self.patch)):
            raise ValueError(
                f"shape is {list(self.shape)} and patch is {list(self.patch)}: give both the same two or more dimensions, every length a "
                "multiple of the patch's"
            )
        return self

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each dimension."""
        return tuple(n // p for n, p in zip(self.shape, self.patch))

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def values(self) -> int:
        """Numbers per patch."""
        return self.channels * math.prod(self.patch)

    @property
    def frames(self) -> int:
        """Length of the first dimension that a sample needs: the past, plus one future patch under next_step."""
        return self.shape[0] + (self.patch[0] if self.objective == "next_step" else 0)


class Tokenformer(Section):
    """Products as attention over `tokens` key-value pairs (arXiv 2410.23168)."""

    tokens: Positive
    """Key-value pairs of each product."""
    scale: Annotated[float, Field(gt=0)] | None = None
    """Factor on the normalized scores. Default: √tokens. A model whose tokens grew keeps its old scale."""


class Matformer(Section):
    """Trains prefixes of the feed-forward that work as models of their own (arXiv 2310.07707). The whole width is always included."""

    sizes: tuple[Positive, ...]
    """Nested feed-forward widths that are models of their own."""
    train: Literal["sample", "sum"] = "sample"
    """`sample`: a step trains one of the widths, drawn by the step's number. `sum`: every step trains all of them, equally weighted."""


class Model(Section):
    family: Literal["decoder", "encoder", "encoder_decoder", "spacetime"] = "decoder"
    """Model family: a causal decoder, a bidirectional encoder, an encoder-decoder, or a transformer over grids (video, weather)."""
    num_layers: Layers
    """Number of layers; for `encoder_decoder`, those of the decoder."""
    encoder_layers: Layers | None = None
    """Layers of the encoder of an `encoder_decoder`. Default: `num_layers`."""
    hidden_size: Positive
    """Width of the residual stream."""
    num_heads: Positive
    """Query heads per layer."""
    num_kv_heads: Filled = None  # type: ignore[assignment]  # filled in below
    """Key-value heads per layer (grouped-query attention). Default: `num_heads`."""
    head_dim: Filled = None  # type: ignore[assignment]  # filled in below
    """Channels per head. Default: `hidden_size / num_heads`."""
    ffn_size: Filled = None  # type: ignore[assignment]  # filled in below
    """Width of the feed-forward. Default: 8/3 of `hidden_size` rounded up to a multiple of 64 for gated kinds, otherwise 4 times
    `hidden_size`.
    """
    ffn: Annotated[str, RowName(activations)] = "swiglu"
    """Feed-forward kind. `geglu_tanh` and `gelu_tanh` use the tanh approximation of GELU (T5 1.1 and GPT-2)."""
    attention: Annotated[str, RowName(attentions)] = "grouped"
    """Kind of attention: `grouped`, softmax attention whose query heads share `num_kv_heads` heads of keys and values, or a plugin's."""
    bias: bool = False
    """Biases in the products and LayerNorms."""
    dropout: Share = 0.0
    """Dropout probability after attention and feed-forward."""
    norm: Annotated[str, RowName(norms)] = "rmsnorm"
    """Norm layers."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Epsilon of the norms."""
    norm_eps_of: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Epsilons of norms that differ, by norm (`qk_norm`) or by layer (`blocks.3.ffn_norm`)."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of initial weights."""
    residual: Annotated[str, RowName(residuals)] = "pre"
    """Residual scheme: where a block has norms, how branches are scaled, and how weights start."""
    branchnorm_period: Positive | None = None
    """Steps over which BranchNorm turns into post-norm; needed for `residual: branchnorm`. 4000 is quoted from its paper."""
    token_correlation: Annotated[float, Field(gt=0, le=1)] = 0.221
    """Mean correlation of embedded tokens that DeepScaleLM's initialization assumes. `megascale probe` measures it on your data."""
    deepscale_unit: Literal["variance", "gradient"] = "variance"
    """What a DeepScaleLM feed-forward keeps at unit size at the start, the forward variance or the gradient. They differ by a factor of
    two for SwiGLU.
    """
    dyt_alpha: tuple[float, float] = (0.5, 0.5)
    """Initial α of DyT, tanh(αx): before attention, and elsewhere."""
    linear: Literal["dense", "bitlinear", "tokenformer"] = "dense"
    """Products of the blocks: dense, BitLinear (ternary weights and 8-bit inputs), or TokenFormer (attention over parameter tokens)."""
    tokenformer: Tokenformer | None = None
    """Settings of `linear: tokenformer` (arXiv 2410.23168)."""
    matformer: Matformer | None = None
    """Nested feed-forward widths that are trained together (MatFormer, arXiv 2310.07707); the whole width is always one of them."""
    ffn_sizes: tuple[Positive, ...] | None = None
    """Feed-forward width of each layer, if they differ."""
    mus_tau: Annotated[float, Field(gt=0, lt=1)] | None = None
    """τ of unit-scaled residuals, √(1−τ)·x + √τ·branch. Default: 0.8/√num_layers, kept between 0.1 and 0.4."""
    layer_coefficients: tuple[tuple[float, float], ...] | None = None
    """Skip and branch coefficients of each layer, if they differ from the residual scheme's own."""
    position: Annotated[str, RowName(positions)] = "rope"
    """Position encoding. `relative`: T5's learned biases by distance, one table per stack."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Scaling of rotary frequencies for a longer context."""
    rope_exponents: tuple[float, ...] | None = None
    """Exponent u of each rotary pair, whose frequency is rope_theta^(−u). Default: 2i/head_dim."""
    alibi_slopes: tuple[float, ...] | None = None
    """ALiBi slope of each head. Default: the geometric series for the number of heads."""
    relative_buckets: Annotated[int, Field(ge=4)] = 32
    """Buckets of `position: relative`."""
    relative_distance: Positive = 128
    """Distance in tokens beyond which `position: relative` uses the last bucket."""
    attention_scale: Annotated[float, Field(gt=0)] | None = None
    """Factor on attention scores. Default: 1/√head_dim."""
    head_scale: Annotated[float, Field(gt=0)] | None = None
    """Factor on the input of the output head. Default: the residual scheme's."""
    sliding_window: Positive | None = None
    """Tokens that a token can attend to, itself included. Absent: all earlier ones."""
    tie_embeddings: bool = False
    """Use the embedding table as the output head."""
    share_embeddings: bool = True
    """`encoder_decoder`: one vocabulary and one embedding table for both sides."""
    embedding_norm: bool = False
    """A norm on the embedded tokens before the first block, as in BERT."""
    mlm_head: bool = False
    """BERT's head: a dense layer, an activation and a norm before the output head, and with `bias` a bias per token after it."""
    qk_norm: bool | Literal["width"] = False
    """Norm on queries and keys: within each head (`true`), or over all heads together (`width`, as in OLMo 2)."""
    vocab_size: Positive | None = None
    """Size of the vocabulary. Default: the tokenizer's."""
    vocab_enabled: Positive | None = None
    """Tokens with this id or a higher one cannot be predicted yet. Growth of the vocabulary sets it to stay exact."""
    source_vocab_size: Positive | None = None
    """Vocabulary size of the encoder without `share_embeddings`. Default: its tokenizer's."""
    moe: Moe | None = None
    """Mixture of experts. Absent: dense."""
    moeut: Moeut | None = None
    """Universal transformer with mixtures of experts (MoEUT, arXiv 2405.16039). Absent: every layer has weights of its own."""

    @property
    def rotary_dim(self) -> int:
        """Channels per head that rotary positions rotate: under MoEUT half of them, rounded down to an even number."""
        return self.head_dim if self.moeut is None else self.head_dim // 4 * 2

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies two products."""
        return self.ffn_row.gated

    @property
    def norm_row(self) -> NormRow:
        return norms()[self.norm]

    @property
    def ffn_row(self) -> ActivationRow:
        return activations()[self.ffn]

    @property
    def position_row(self) -> PositionRow:
        return positions()[self.position]

    @property
    def attention_row(self) -> AttentionRow:
        return attentions()[self.attention]

    @property
    def residual_row(self) -> ResidualScheme:
        return residuals()[self.residual]

    @property
    def causal(self) -> bool:
        """Whether a token attends only to itself and earlier ones. An encoder's attends to all."""
        return self.family != "encoder"

    @property
    def total_layers(self) -> int:
        """Layers of both stacks if there are two; the encoder's come first."""
        return self.num_layers + (self.encoder_layers or 0)

    spacetime: Spacetime | None = None
    """Grid of the `spacetime` family."""

    def eps_of(self, norm: str, layer: int | None = None) -> float:
        """The epsilon of a norm: set for its layer, for its kind, or for the model."""
        own = self.norm_eps_of.get(norm, self.norm_eps)
        return own if layer is None else self.norm_eps_of.get(f"blocks.{layer}.{norm}", own)

    def at_layer(self, layer: int) -> Model:
        """This config with the layer's own feed-forward width."""
        return self if self.ffn_sizes is None else self.model_copy(update={"ffn_size": self.ffn_sizes[layer]})

    @model_validator(mode="after")
    def _distances_fit(self) -> Model:
        if self.relative_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"relative_distance is {self.relative_distance} and the first {self.relative_buckets // 2} of {self.relative_buckets} "
                "relative_buckets hold one distance each: choose a longer distance or fewer buckets"
            )
        return self

    @property
    def nested_sizes(self) -> tuple[int, ...]:
        """MatFormer's widths, ascending; the whole width is last."""
        assert self.matformer is not None
        return (*sorted(set(self.matformer.sizes) - {self.ffn_size}), self.ffn_size)

    def attended(self, layer: int) -> int:
        """The dimension of the grid that a layer of the spacetime family attends over: each in turn."""
        assert self.spacetime is not None
        return layer % len(self.spacetime.shape)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Fills in sizes that follow from others, so that the resolved config states every number."""
        if not isinstance(values, dict):
            return values
        v = dict(values)
        hidden, heads, ffn = v.get("hidden_size"), v.get("num_heads"), v.get("ffn", "swiglu")
        if isinstance(heads, int) and v.get("num_kv_heads") is None:
            v["num_kv_heads"] = heads
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and v.get("head_dim") is None:
            if hidden % heads:
                raise ValueError(f"hidden_size {hidden} is not a multiple of num_heads {heads}: change one, or set head_dim")
            v["head_dim"] = hidden // heads
        if isinstance(hidden, int) and v.get("ffn_size") is None:
            # A gated feed-forward has three matrices: 8/3·h holds as many weights as two of 4·h; a multiple of 64 keeps products aligned.
            known = activations().get(ffn) if isinstance(ffn, str) else None
            v["ffn_size"] = -(-hidden * 8 // 3 // 64) * 64 if known is not None and known.gated else 4 * hidden
        if v.get("family") == "encoder_decoder" and v.get("encoder_layers") is None:
            v["encoder_layers"] = v.get("num_layers")
        moe = v.get("moe")
        if isinstance(moe, dict) and moe.get("ffn_size") is None and isinstance(v.get("ffn_size"), int):
            v["moe"] = {**moe, "ffn_size": v["ffn_size"]}
        return v
