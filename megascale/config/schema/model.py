"""The section `model`."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from megascale.config.activations import ActivationRow, activations
from megascale.config.attentions import AttentionRow, attentions
from megascale.config.norms import NormRow, norms
from megascale.config.positions import PositionRow, positions
from megascale.config.residuals import ResidualScheme, residuals
from megascale.config.schema.model_parts import Delta, InitBase, Latent, Matformer, Moe, Moeut, RopeScaling, Spacetime, Tokenformer
from megascale.config.schema.row_name import RowName
from megascale.config.schema.section import Filled, Layers, Positive, Section, Share

if TYPE_CHECKING:  # made from this section's keys, in kinds.py
    from megascale.config.schema.model_parts import Given as Kind

PATTERN = ("kinds", "pattern", "pattern_first", "pattern_last")
# Norms by the names in `model.norm_eps_of`: outside blocks, and in each block (qk_norm and the inner norms belong to its sublayers).
OUTER_NORMS = ("embedding_norm", "final_norm", "mlm_norm")
AHEAD_NORMS = ("hidden_norm", "token_norm", "norm")  # in each module of multi-token prediction (mtp.0.hidden_norm)
BLOCK_NORMS = (
    "attention_norm",
    "attention_post_norm",
    "cross_norm",
    "cross_post_norm",
    "ffn_norm",
    "ffn_post_norm",
    "qk_norm",
    "latent_norm",
    "delta_norm",
    "attention_inner_norm",
    "ffn_inner_norm",
)


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
    """Kind of attention: `grouped`, softmax attention whose query heads share `num_kv_heads` heads of keys and values; `latent`, whose keys
    and values are products of a narrow latent; `gated_delta`, linear attention whose heads keep a state; or a plugin's.
    """
    latent: Latent | None = None
    """Sizes of `attention: latent`."""
    delta: Delta | None = None
    """Sizes of `attention: gated_delta`."""
    bias: bool = False
    """Biases in the products and LayerNorms."""
    attention_bias: bool | Literal["qkv"] | None = None
    """Biases in attention's products, if not as `bias` says: in all four, in none, or in queries, keys and values (`qkv`, as in Qwen2)."""
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
    init_base: InitBase | None = None
    """Sizes by which matrices start, if not the model's own (`optim.transfer` sets it)."""
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
    """Position encoding. `relative`: T5's learned biases by distance, one table per stack. `none`: tokens see no positions (NoPE)."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a head's channels that rotate, the first ones; the others hold no position."""
    rope_interleaved: bool = False
    """Rotate neighbouring channels instead of those half a head apart, as the weights of DeepSeek and GPT-J expect."""
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
    attention_sink: Literal["learned", "zero"] | None = None
    """A logit per query head that takes a share of the softmax beside the keys: `learned`, as in GPT-OSS, starting at zero; or `zero`, the
    off-by-one softmax.
    """
    attention_softcap: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Cap c on attention scores, which become c·tanh(score/c), as in Gemma 2. ALiBi's biases are added to the capped scores."""
    attention_gate: Literal["channel", "head"] | None = None
    """A sigmoid gate on attention's result before its output product, from the layer's input: per channel (Qwen3-Next) or per head."""
    head_scale: Annotated[float, Field(gt=0)] | None = None
    """Factor on the input of the output head. Default: the residual scheme's."""
    logit_softcap: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Cap c on the output logits, which become c·tanh(logit/c)."""
    sliding_window: Positive | None = None
    """Tokens that a token can attend to, itself included. Absent: all earlier ones."""
    tie_embeddings: bool = False
    """Use the embedding table as the output head."""
    share_embeddings: bool = True
    """`encoder_decoder`: one vocabulary and one embedding table for both sides."""
    embedding_factor: Annotated[float, Field(gt=0)] | None = None
    """Factor on the embedded tokens, such as √hidden_size in Gemma. Default: 1."""
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
    mtp_depth: Annotated[int, Field(ge=0, le=3)] = 0
    """Multi-token prediction: modules that each predict one token further (DeepSeek-V3, arXiv 2412.19437). Generation
    drafts with them.
    """
    mtp_weight: Annotated[float, Field(gt=0)] = 0.3
    """Weight of the mean of their losses in training. `loss` in the metrics is without them."""
    kinds: dict[str, Kind] = Field(default_factory=dict)
    """Kinds of layers, by name: the keys in which each differs from the model. `pattern` says which layers are of which kind."""
    pattern: tuple[str, ...] = ()
    """Kinds of the layers in turn, repeated through the depth between `pattern_first` and `pattern_last`. Empty: all layers are alike."""
    pattern_first: tuple[str, ...] = ()
    """Kinds of the first layers, before the pattern begins."""
    pattern_last: tuple[str, ...] = ()
    """Kinds of the last layers, after the pattern's last repetition."""

    @property
    def rotary_dim(self) -> int:
        """Channels per head that rotary positions rotate: under MoEUT half of them, rounded down to an even number."""
        if self.latent is not None:
            return self.latent.rope_dim
        return int(self.head_dim * self.rope_fraction) if self.moeut is None else self.head_dim // 4 * 2

    @property
    def head_width(self) -> int:
        """Channels of a head's queries, keys and values as attention gets them."""
        if self.latent is not None:
            return max(self.head_dim + self.latent.rope_dim, self.latent.value_dim or self.head_dim)
        return self.head_dim

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
    def attention_sized(self) -> bool:
        """Whether the sections that the attention's row reads are there; a rule refuses models without them."""
        return all(getattr(self, key) is not None for key in self.attention_row.reads)

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

    @property
    def longest_stack(self) -> int:
        """Layers of the longer of two stacks, or of the one."""
        return max(self.num_layers, self.encoder_layers or 0)

    def eps_of(self, norm: str, layer: int | None = None) -> float:
        """The epsilon of a norm: set for its layer, for its kind, or for the model."""
        own = self.norm_eps_of.get(norm, self.norm_eps)
        return own if layer is None else self.norm_eps_of.get(f"blocks.{layer}.{norm}", own)

    def eps_ahead(self, module: int, norm: str) -> float:
        """The epsilon of a norm in a module of multi-token prediction: its own, or that of the norm before the head."""
        return self.norm_eps_of.get(f"mtp.{module}.{norm}", self.eps_of("final_norm"))

    def at_layer(self, layer: int) -> Model:
        """The config of one layer: its kind's, with its own feed-forward width."""
        own = self.of_kind(self.kind_at(layer)) if self.kinds else self
        return own if self.ffn_sizes is None else own.model_copy(update={"ffn_size": self.ffn_sizes[layer]})

    def kind_at(self, layer: int) -> str:
        """The name of a layer's kind, in a model that has kinds. Multi-token prediction has blocks of the last layer's kind."""
        layer = min(layer, self.num_layers - 1)
        first, last = len(self.pattern_first), self.num_layers - len(self.pattern_last)
        if layer < first:
            return self.pattern_first[layer]
        return self.pattern_last[layer - last] if layer >= last else self.pattern[(layer - first) % len(self.pattern)]

    def of_kind(self, name: str) -> Model:
        """The config of a model whose layers are all of one kind."""
        kind = self.kinds[name]
        given = {key: getattr(kind, key) for key in kind.model_fields_set}
        if given.get("moe") is not None:
            changes = {key: getattr(given["moe"], key) for key in given["moe"].model_fields_set}
            moe = (self.moe or Moe()).model_copy(update=changes)
            if moe.ffn_size is None:
                moe = moe.model_copy(update={"ffn_size": given.get("ffn_size", self.ffn_size)})
            given["moe"] = moe
        return self.model_copy(update={**given, "kinds": {}, "pattern": (), "pattern_first": (), "pattern_last": ()})

    @property
    def variants(self) -> dict[str, Model]:
        """The config of each kind of layer, by name; in a model without kinds itself, under an empty name."""
        return {name: self.of_kind(name) for name in self.kinds} or {"": self}

    def layers_of(self, kind: str) -> list[int]:
        """The layers of a kind; all of them in a model without kinds."""
        return [i for i in range(self.num_layers) if not self.kinds or self.kind_at(i) == kind]

    @property
    def has_experts(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return any(m.moe is not None for m in self.variants.values())

    @model_validator(mode="after")
    def _pattern_fits(self) -> Model:
        odd = next((n for n in self.kinds if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", n)), None)
        if odd is not None:
            raise ValueError(f"kinds has the name {odd!r}: use letters, digits, '_' and '-', not beginning with a digit")
        named = {"pattern": self.pattern, "pattern_first": self.pattern_first, "pattern_last": self.pattern_last}
        for key, names in named.items():
            unknown = next((n for n in names if n not in self.kinds), None)
            if unknown is not None:
                near = difflib.get_close_matches(unknown, self.kinds, 1, 0.6)
                hint = f"; did you mean {near[0]}?" if near else f"; its names are {', '.join(self.kinds) or 'none'}"
                raise ValueError(f"{key} names {unknown}, which is not in kinds{hint}")
        unused = [n for n in self.kinds if not any(n in names for names in named.values())]
        if unused:
            raise ValueError(f"kinds has {', '.join(unused)}, but no layer is of that kind: name it in pattern, or remove it")
        if self.kinds:
            ends = len(self.pattern_first) + len(self.pattern_last)
            middle, turn = self.num_layers - ends, len(self.pattern)
            if middle < 0 or (middle % turn if turn else middle):
                raise ValueError(
                    f"num_layers is {self.num_layers}, pattern_first and pattern_last name {ends} of them, and pattern has {turn} "
                    f"name{'' if turn == 1 else 's'}: whole patterns must fill the rest; put the names that are left over into "
                    "pattern_first or pattern_last"
                )
        return self

    @model_validator(mode="after")
    def _kinds_are_models(self) -> Model:
        for name in self.kinds:
            try:
                Model.model_validate(self.of_kind(name).model_dump(by_alias=True))
            except ValidationError as error:
                first = error.errors()[0]
                raise ValueError(f"kinds.{name} does not make a block: {first['msg'].removeprefix('Value error, ')}") from None
        return self

    @model_serializer(mode="wrap")
    def _without_kinds(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves the keys of kinds out of models without them."""
        kept: dict[str, Any] = handler(self)
        return kept if self.kinds else {k: v for k, v in kept.items() if k not in PATTERN}

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
