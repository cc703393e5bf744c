"""The sections `model` and below it."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megascale.config.schema.section import Layers, NonNegative, Positive, Probability, Section

# The norms by the names that `model.norm_eps_of` knows: outside blocks; of a block, where qk_norm and the inner norms stand in sublayers.
OUTER_NORMS = ("embedding_norm", "final_norm", "mlm_norm")
BLOCK_NORMS = ("attention_norm", "cross_norm", "ffn_norm", "qk_norm", "attention_inner_norm", "ffn_inner_norm")


class Moe(Section):
    num_experts: Positive = 8
    top_k: Positive = 2
    num_shared: NonNegative = 0  # experts that every token meets, as one of num_shared times the width
    ffn_size: Positive | None = None  # of one expert; the model's if absent
    every: Positive = 1  # every n-th layer has experts, the others are dense
    router: Literal["topk_softmax", "softmax_topk", "sigmoid", "sigma", "xmoe"] = "topk_softmax"
    balance: Literal["loss", "entropy", "bias", "none"] = "loss"
    aux_loss: Annotated[float, Field(ge=0)] = 1e-2  # weight of the balance or entropy loss
    z_loss: Annotated[float, Field(ge=0)] = 1e-3
    bias_rate: Annotated[float, Field(gt=0)] = 1e-3  # by which balance: bias moves a step
    capacity_factor: Annotated[float, Field(gt=0)] | None = None  # absent: no token is dropped
    eval_capacity_factor: Annotated[float, Field(gt=0)] = 2.0  # in evaluation, where capacity_factor is set
    init: Literal["model", "st_moe"] = "model"


class Moeut(Section):
    """Layers in groups whose weights repeat in depth, with experts in attention beside those of `moe` (arXiv 2405.16039)."""

    group_size: Positive = 2  # layers with weights of their own
    attention_experts: Positive = 8  # for the values and for the output of every head
    attention_top_k: Positive = 2
    attention_aux_loss: Annotated[float, Field(ge=0)] = 1e-3  # weight of their entropy loss


class RopeScaling(Section):
    """How rotary wavelengths are stretched by `factor` for a context longer than the model's first one, `original_seq_len`.

    llama3  those longer than original/low_freq_factor, none shorter than original/high_freq_factor, blended between (Llama 3's)
    linear  all of them (position interpolation, arXiv 2306.15595)
    yarn    those that turn less than beta_slow times in the original context, none that turn more than beta_fast times, blended between;
            cosines and sines are multiplied by `attention_factor`, 0.1·ln(factor) + 1 if absent (YaRN, arXiv 2309.00071)
    """

    type: Literal["llama3", "linear", "yarn"] = "llama3"
    factor: Annotated[float, Field(gt=0)]
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    original_seq_len: Positive = 8192
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    attention_factor: Annotated[float, Field(gt=0)] | None = None

    @property
    def amplitude(self) -> float:
        """Of cosines and sines."""
        if self.type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 1.0 if self.factor <= 1.0 else 0.1 * math.log(self.factor) + 1.0


class Spacetime(Section):
    """Fields of numbers on a grid, [s₁ … s_K, channels] a sample: video, weather, volumes. Each patch of the grid is a token."""

    shape: Annotated[tuple[Positive, ...], Field(max_length=8)]  # of a sample; the first dimension is time where there is one
    patch: Annotated[tuple[Positive, ...], Field(max_length=8)]  # of a token, along each dimension
    channels: Positive
    objective: Literal["masked", "next_step"] = "masked"  # fill in hidden patches, or see the past and tell the next patch in time
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    text_len: Positive | None = None  # places of a text that goes with each sample, which every block attends to; absent: no text
    text_vocab_size: Positive | None = None  # of it; from the tokenizer beside PREFIX.text if absent

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
        """Numbers in a patch."""
        return self.channels * math.prod(self.patch)

    @property
    def frames(self) -> int:
        """How much of the first dimension a sample needs: the past, and with next_step one patch of future."""
        return self.shape[0] + (self.patch[0] if self.objective == "next_step" else 0)


class Tokenformer(Section):
    """Products as attention over `tokens` pairs of key and value (arXiv 2410.23168). `scale` of the normalized scores: √tokens if absent; a
    model whose tokens grew keeps the old one.
    """

    tokens: Positive
    scale: Annotated[float, Field(gt=0)] | None = None


class Matformer(Section):
    """Prefixes of the feed-forward that are models of their own (arXiv 2310.07707); the whole width is always one of them.

    train  sample: a step trains one of the widths, drawn by its number; sum: every step trains all of them, each counting alike
    """

    sizes: tuple[Positive, ...]
    train: Literal["sample", "sum"] = "sample"


class Model(Section):
    family: Literal["decoder", "encoder", "encoder_decoder", "spacetime"] = "decoder"
    num_layers: Layers  # of an encoder_decoder those of its decoder
    encoder_layers: Layers | None = None  # of an encoder_decoder; num_layers if absent
    hidden_size: Positive
    num_heads: Positive
    num_kv_heads: Positive | None = None
    head_dim: Positive | None = None
    ffn_size: Positive | None = None
    # gelu_tanh: GPT-2's approximation; geglu_tanh: a gate through it, as T5 1.1 has
    ffn: Literal["swiglu", "geglu_tanh", "gelu", "gelu_tanh", "relu"] = "swiglu"
    bias: bool = False
    dropout: Probability = 0.0
    norm: Literal["rmsnorm", "layernorm", "dyt"] = "rmsnorm"
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    # Of norms with another: qk_norm, or of one layer: blocks.3.ffn_norm
    norm_eps_of: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    init_std: Annotated[float, Field(gt=0)] = 0.02
    residual: Literal[
        "pre", "post", "res_post", "deepnorm", "branchnorm", "deepscale", "deepscale_post", "subln", "layerscale", "parallel", "mus"
    ] = "pre"
    branchnorm_period: Positive | None = None  # steps until BranchNorm is post-norm; the paper's value is not certain (4000 is quoted)
    token_correlation: Annotated[float, Field(gt=0, le=1)] = 0.221  # of DeepScaleLM's embeddings; tools/probe.py measures it on your data
    # What a feed-forward of DeepScaleLM keeps at the start; for SwiGLU, a product, the two are a factor of two apart (docs/depth.md)
    deepscale_unit: Literal["variance", "gradient"] = "variance"
    dyt_alpha: tuple[float, float] = (0.5, 0.5)  # DyT's α at the start: before attention, elsewhere
    # Of the blocks' products. bitlinear: weights −1, 0, 1 and 8-bit inputs; tokenformer: attention over tokens that are parameters
    linear: Literal["dense", "bitlinear", "tokenformer"] = "dense"
    tokenformer: Tokenformer | None = None  # with linear tokenformer
    matformer: Matformer | None = None  # nested feed-forward widths that are trained together
    ffn_sizes: tuple[Positive, ...] | None = None  # of each layer, where they differ
    mus_tau: Annotated[float, Field(gt=0, lt=1)] | None = None
    layer_coefficients: tuple[tuple[float, float], ...] | None = None  # skip and branch of each layer, where it is not the scheme's own
    # relative: T5's learned biases by distance, one table a stack
    position: Literal["rope", "alibi", "learned", "xpos", "relative"] = "rope"
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_exponents: tuple[float, ...] | None = None  # u of each pair of a head, its frequency being rope_theta^−u; absent: 2i/head_dim
    alibi_slopes: tuple[float, ...] | None = None  # of each head; absent: the geometric ones of their number
    relative_buckets: Annotated[int, Field(ge=4)] = 32  # of position relative
    relative_distance: Positive = 128  # from which on all are in the last bucket
    attention_scale: Annotated[float, Field(gt=0)] | None = None  # of scores; 1/√head_dim if absent
    head_scale: Annotated[float, Field(gt=0)] | None = None  # of what enters the head; the scheme's if absent
    sliding_window: Positive | None = None
    tie_embeddings: bool = False  # the head is the table of the tokens that are predicted
    share_embeddings: bool = True  # of an encoder_decoder: one vocabulary and one table for both sides
    embedding_norm: bool = False  # a norm on the embedded tokens, before the first block, as BERT has it
    mlm_head: bool = False  # BERT's: a dense layer, an activation and a norm before the head, with `bias` a bias for each token behind it
    qk_norm: bool | Literal["width"] = False  # true: within each head; width: over all heads together, as OLMo 2 has it
    vocab_size: Positive | None = None  # from the tokenizer if absent
    vocab_enabled: Positive | None = None  # tokens from this one on cannot be predicted yet: a vocabulary that grew without a trace
    source_vocab_size: Positive | None = None  # without share_embeddings, of the encoder's own table; from its tokenizer if absent
    moe: Moe | None = None
    moeut: Moeut | None = None

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotary positions turn: MoEUT's turn half of them, as an even number."""
        assert self.head_dim is not None
        return self.head_dim if self.moeut is None else self.head_dim // 4 * 2

    @property
    def gated(self) -> bool:
        """The feed-forward multiplies two products."""
        return self.ffn in ("swiglu", "geglu_tanh")

    @property
    def causal(self) -> bool:
        """A token sees itself and what is before it; an encoder's sees all."""
        return self.family != "encoder"

    @property
    def total_layers(self) -> int:
        """Of both stacks where there are two: the encoder's come first."""
        return self.num_layers + (self.encoder_layers or 0)

    spacetime: Spacetime | None = None  # with family spacetime

    def eps_of(self, norm: str, layer: int | None = None) -> float:
        """The epsilon of a norm: that of its layer, of its kind, or of the model."""
        own = self.norm_eps_of.get(norm, self.norm_eps)
        return own if layer is None else self.norm_eps_of.get(f"blocks.{layer}.{norm}", own)

    def at_layer(self, layer: int) -> Model:
        """The same, with the feed-forward width of a layer."""
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
        """Of MatFormer, the whole width last."""
        assert self.matformer is not None and self.ffn_size is not None
        return (*sorted(set(self.matformer.sizes) - {self.ffn_size}), self.ffn_size)

    def attended(self, layer: int) -> int:
        """The dimension of the grid that a layer of the spacetime family attends over: each in turn."""
        assert self.spacetime is not None
        return layer % len(self.spacetime.shape)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Sizes that follow from others, so that the resolved config states every number."""
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
            # Three matrices of a gated one of 8/3·h hold as many weights as two of 4·h; a multiple of 64 keeps products aligned.
            v["ffn_size"] = -(-hidden * 8 // 3 // 64) * 64 if ffn in ("swiglu", "geglu_tanh") else 4 * hidden
        if v.get("family") == "encoder_decoder" and v.get("encoder_layers") is None:
            v["encoder_layers"] = v.get("num_layers")
        moe = v.get("moe")
        if isinstance(moe, dict) and moe.get("ffn_size") is None and isinstance(v.get("ffn_size"), int):
            v["moe"] = {**moe, "ffn_size": v["ffn_size"]}
        return v
