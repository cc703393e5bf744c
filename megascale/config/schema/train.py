"""The sections about training: `train`, `precision`, `optim`, `data`, `checkpoint`."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from megascale.config.schema.section import NonNegative, Positive, Section, Share, Tokens


class Train(Section):
    steps: Positive | None = None
    tokens: Tokens | None = None
    global_batch_size: Positive = 8
    micro_batch_size: Positive = 1
    seq_len: Positive = 512  # of an encoder_decoder the places of a target
    source_len: Positive | None = None  # of an encoder_decoder the places of a source; seq_len if absent
    clip: Annotated[float, Field(ge=0)] = 1.0  # largest global gradient norm; 0 switches clipping off
    log_every: Positive = 1
    eval_every: NonNegative = 0
    eval_steps: Positive = 10
    packing: Literal["concat", "documents"] = "concat"
    max_skipped_steps: NonNegative = 10  # in a row

    @model_validator(mode="after")
    def _length(self) -> Train:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(f"steps is {self.steps} and tokens is {self.tokens}: set exactly one of train.steps and train.tokens")
        return self

    @property
    def source_length(self) -> int:
        """Places of a source, where there are sources."""
        return self.source_len or self.seq_len

    @property
    def total_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return max(1, self.tokens // (self.global_batch_size * self.seq_len))


def _fp8(value: Any) -> Any:
    """true means static; the words are those that pydantic takes for other switches."""
    if not isinstance(value, bool | str):
        return value
    word = str(value).lower()
    return "static" if word in ("true", "yes", "on") else "false" if word in ("no", "off") else word


def _power_of_two(value: float) -> float:
    if math.frexp(value)[0] != 0.5:
        raise ValueError(f"{value:g} would round gradients: give a power of two, such as {2.0 ** round(math.log2(value)):g}")
    return value


class Precision(Section):
    compute: Literal["fp32", "bf16", "fp64"] = "fp32"
    fp8: Annotated[Literal["false", "static", "dynamic"], BeforeValidator(_fp8)] = "false"
    master: Literal["fp32", "bf16", "fp64"] | None = None  # of the stored weights; fp64 under fp64 compute, else fp32
    fp8_recipe: Literal["tensorwise", "rowwise"] = "tensorwise"  # of fp8 dynamic: what shares a scale
    fp8_watch: NonNegative = 100  # steps between two looks at what FP8 casts lose; 0 never looks
    # Of fp8 static: the gradients' factor during backward, a power of two; from the shapes if absent.
    loss_scale: Annotated[float, Field(gt=0, le=2.0**64), AfterValidator(_power_of_two)] | None = None

    @property
    def storage(self) -> str:
        return self.master or ("fp64" if self.compute == "fp64" else "fp32")


def any_layer(weight: str) -> str:
    """blocks.3.ffn.up.weight → blocks.*.ffn.up.weight; other names as they are."""
    return re.sub(r"^blocks\.\d+\.", "blocks.*.", weight)


class Multiplier(Section):
    """What a weight's rate, decay, epsilon and part in the gradient norm are multiplied with."""

    lr: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: Annotated[float, Field(gt=0)] = 1.0
    eps: Annotated[float, Field(gt=0)] = 1.0
    norm: Annotated[float, Field(gt=0)] = 1.0


class Optim(Section):
    name: Literal["adamw", "lion", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 3e-4
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    warmup_steps: NonNegative = 0
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay_steps: Positive | None = None  # cosine, linear: where the decay ends (the last step); wsd: length of the final decay
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    base_width: Positive | None = None  # hidden size for which lr was tuned: under unit scaling hidden matrices' rates follow the width
    independent_decay: bool = False  # a step keeps 1 − weight_decay·lr/peak lr of a weight, whatever its rate
    # By weight, head.weight or blocks.*.attention.q.weight: a grown run moves as its source's would.
    multipliers: dict[str, Multiplier] = Field(default_factory=dict)

    def multiplier(self, weight: str) -> Multiplier:
        """By the weight's own name, or by its name in any layer."""
        return self.multipliers.get(weight, self.multipliers.get(any_layer(weight), Multiplier()))


class DataSource(Section):
    path: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    name: str | None = None


class Data(Section):
    train: str | list[DataSource | str]
    valid: str | list[DataSource | str] | None = None
    valid_fraction: Share = 0.0
    order: Literal["megascale", "megatron"] = "megascale"  # megatron: the order of megatron-core's GPTDataset and blends
    objective: Literal["translation", "span_corruption"] | None = None  # of an encoder_decoder; translation if absent
    mask_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None  # of the tokens to be named by an encoder, or in spans; 0.15 if absent
    mask_token: NonNegative | None = None  # what hides a token from an encoder; absent: a piece behind the tokenizer's, the last one
    start_token: NonNegative | None = None  # that an encoder_decoder's targets begin behind; the end token if absent (T5: 0, its padding)
    mark_token: NonNegative | None = None  # of the first span, the others' below it; absent: behind the tokenizer's (T5's own: 32099)
    mean_span: Annotated[float, Field(ge=1)] | None = None  # tokens of a span under span_corruption; 3 if absent
    tokenizer: str | None = None
    source_tokenizer: str | None = None  # of translation without share_embeddings

    @property
    def masked(self) -> float:
        """The share of tokens to be named."""
        return self.mask_fraction or 0.15


class Checkpoint(Section):
    every: NonNegative = 0  # steps; 0 saves at the end only
    keep_last: Positive = 3
    keep_every: Positive | None = None
    asynchronous: bool = Field(default=True, alias="async")
    resume: str = "auto"  # auto | never | a step folder or a run
    init_from: str | None = None  # weights alone: of a checkpoint of ours, or of a Hugging Face folder
    init_schedule: Literal["given", "lemon"] = "given"  # lemon: with init_from, warm up again and decay within 0.6 of the run
    init_data: Literal["restart", "continue"] = "restart"  # where the data begins with init_from: anew, or where the other run stood
    export: Literal["none", "hf"] = "none"  # beside every kept checkpoint, under hf/
