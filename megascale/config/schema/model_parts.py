"""The sections below `model`: experts, MoEUT, rotary scaling, grids, TokenFormer and MatFormer."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from megascale.config.routers import RouterRow, routers
from megascale.config.schema.row_name import RowName
from megascale.config.schema.section import Layers, NonNegative, Positive, Section


class Given(Section):
    """Keys of a section that differ for some layers. Only these are saved: a null among them is a value."""

    @model_serializer(mode="wrap")
    def _only_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if k in self.model_fields_set}


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
    renormalize: bool | None = None
    """Whether the gates of several chosen experts are divided by their sum. Default: as the router's row does."""
    routed_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on all gates of routed experts."""
    groups: Positive | None = None
    """Groups of consecutive experts: a token chooses among those of its `top_groups` best groups only. Absent: among all experts."""
    top_groups: Positive | None = None
    """Groups that a token may choose experts from."""
    group_score: Literal["top2", "max"] = "top2"
    """Score of a group: the sum of its two best experts' scores (DeepSeek-V3), or its best one (DeepSeek-V2)."""
    router_bias: bool = False
    """A learned bias per expert on the router's logits."""
    expert_bias: bool = False
    """Biases in all products of routed experts."""
    shared_gate: bool = False
    """The shared experts' output is multiplied by a learned sigmoid gate per token, as in Qwen2-MoE."""
    balance: Literal["loss", "entropy", "bias", "none"] = "loss"
    """How load is balanced: an auxiliary loss, an entropy loss, router biases without a loss, or not at all."""
    aux_loss: Annotated[float, Field(ge=0)] = 1e-2
    """Weight of the balance or entropy loss."""
    balance_over: Literal["sequence", "batch"] = "sequence"
    """Where `balance: loss` counts the load: in each sequence, or in the whole global batch of the step before (at first: even)."""
    sequence_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a balance loss per sequence beside `balance: bias`, as in DeepSeek-V3. It counts choices by scores without biases."""
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


class Latent(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads are products of one narrow vector."""

    kv_rank: Positive
    """Width of the latent that keys and values are made from, and that generation caches."""
    query_rank: Positive | None = None
    """Width of the latent that queries are made from. Absent: from the stream itself."""
    rope_dim: Positive = 64
    """Channels of each head that hold the position, beside `head_dim` for the content; all heads' keys share them."""
    value_dim: Positive | None = None
    """Channels of each head's values. Default: `head_dim`."""


class Delta(Section):
    """Linear attention by the gated delta rule (Gated DeltaNet, arXiv 2412.06464): each value head keeps a matrix [key_dim, value_dim]."""

    key_heads: Positive
    """Heads of queries and keys."""
    value_heads: Positive
    """Heads of values, a multiple of `key_heads`: consecutive ones share a query and a key."""
    key_dim: Positive = 128
    """Channels of each query and key."""
    value_dim: Positive = 128
    """Channels of each value."""
    conv_size: Positive = 4
    """Tokens of the causal convolution over queries, keys and values, the token itself included."""


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
    truncate: bool = True
    """`yarn`: the channels between which the ramp runs are rounded outwards; GPT-OSS does not round them."""

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves `truncate` out where it is as in configs that do not know it."""
        return {k: v for k, v in handler(self).items() if k != "truncate" or v is False}

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


class InitBase(Section):
    """A smaller model by whose sizes weights start."""

    width: Positive | None = None
    """Hidden size at which matrices start with `init_std`; wider ones with √(width ÷ hidden_size) of it."""
    depth: Layers | None = None
    """Number of layers by which matrices that write into the stream start smaller, instead of the model's own."""
