"""The sections about training: `train`, `precision`, `optim`, `data`, `checkpoint`."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from megascale.config.decays import decays
from megascale.config.optimizers import optimizers
from megascale.config.schema.averages import Ema, OneOrMany, different, listed
from megascale.config.schema.row_name import RowName
from megascale.config.schema.section import Layers, NonNegative, Positive, Section, Share, Tokens


class SkipSpikes(Section):
    """Skips steps whose loss or gradient norm is far above those of the steps before."""

    sigma: Annotated[float, Field(gt=0)] = 6.0
    """Standard deviations above the mean from which a loss or a gradient norm is a spike. A deviation counts as at least 0.1 % of the mean.
    """
    window: Annotated[int, Field(ge=8, le=65536)] = 128
    """Steps that mean and deviation are taken over: the last ones that changed the weights. No step is skipped before there are so many."""
    in_a_row: Positive = 10
    """Most steps that are skipped one after the other. The next one is taken whatever its loss, and the window begins anew."""


class Train(Section):
    steps: Positive | None = None
    """Length of the run in optimizer steps. Set exactly one of `steps` and `tokens`."""
    tokens: Tokens | None = None
    """Length of the run in tokens, instead of `steps`."""
    global_batch_size: Positive = 8
    """Sequences per step, over all ranks."""
    micro_batch_size: Positive = 1
    """Sequences per data-parallel rank and micro-batch. The rest of the batch is gradient accumulation."""
    seq_len: Positive = 512
    """Tokens per sequence; for an `encoder_decoder`, of a target."""
    source_len: Positive | None = None
    """Tokens of a source of an `encoder_decoder`. Default: `seq_len`."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; larger gradients are scaled down. 0 switches clipping off."""
    log_every: Positive = 1
    """Steps between rows of `metrics.jsonl`. The first, the last and every evaluated step are logged in any case."""
    eval_every: NonNegative = 0
    """Steps between evaluations. 0: never."""
    eval_steps: Positive = 10
    """Global batches per evaluation and validation set."""
    packing: Literal["concat", "documents"] = "concat"
    """How documents fill a sequence: `concat` lets attention cross documents; `documents` keeps attention, positions and targets inside
    each.
    """
    skip_spikes: SkipSpikes | None = None
    """Skip steps whose loss or gradient norm is far above those of the steps before. Absent: only those that are not finite."""
    max_skipped_steps: NonNegative = 10
    """Steps in a row that may be skipped because a gradient is not finite; more of them end the run with exit code 3."""

    @model_validator(mode="after")
    def _length(self) -> Train:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(f"steps is {self.steps} and tokens is {self.tokens}: set exactly one of train.steps and train.tokens")
        return self

    @property
    def source_length(self) -> int:
        """Positions of a source, if there are sources."""
        return self.source_len or self.seq_len

    @property
    def total_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return max(1, self.tokens // (self.global_batch_size * self.seq_len))


def _fp8(value: Any) -> Any:
    """true means static. Accepts the words that pydantic accepts for booleans."""
    if not isinstance(value, bool | str):
        return value
    word = str(value).lower()
    return "static" if word in ("true", "yes", "on") else "false" if word in ("no", "off") else word


_FP8: dict[str, Any] = {"enum": [False, True, "static", "dynamic", "false"]}  # a resolved config says "false"


def _power_of_two(value: float) -> float:
    if math.frexp(value)[0] != 0.5:
        raise ValueError(f"{value:g} would round gradients: give a power of two, such as {2.0 ** round(math.log2(value)):g}")
    return value


class Precision(Section):
    compute: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Number format of products, attention and the residual stream. Norm statistics, the loss and gradient sums stay at least fp32,
    sums over ranks unless `reduce` is bf16.
    """
    fp8: Annotated[Literal["false", "static", "dynamic"], BeforeValidator(_fp8), WithJsonSchema(_FP8)] = "false"
    """FP8 products: `static` scales (`true` means the same; for unit-scaled models) or `dynamic` scales from the largest value (extra
    `fp8`).
    """
    master: Literal["fp32", "bf16", "fp64"] | None = None
    """Number format of the stored weights. Default: fp64 under fp64 compute, otherwise fp32."""
    reduce: Literal["fp32", "bf16", "fp64"] | None = None
    """Number format in which FSDP2 sums gradients over ranks. Default: that of the stored weights. `bf16` halves what a reduce-scatter
    sends; sums then depend on the number of ranks, within bf16's rounding.
    """
    fp8_recipe: Literal["tensorwise", "rowwise"] = "tensorwise"
    """`fp8: dynamic`: one scale per tensor or one per row."""
    fp8_watch: NonNegative = 100
    """Steps between measurements of what FP8 casts lose. 0: never."""
    loss_scale: Annotated[float, Field(gt=0, le=2.0**64), AfterValidator(_power_of_two)] | None = None
    """`fp8: static`: factor on gradients during backward, a power of two. Default: derived from the shapes."""

    shadow_weights: bool | None = None
    """Keep weights that nothing gathers (one GPU, DDP, pipelines without data parallelism) in `compute`, too, so that products do not cast
    them again: the same numbers for 2 bytes a weight. FSDP2 gathers in `compute` anyway. Default: yes, unless `parallel.recompute` is
    `full` or `nested`, which save memory first.
    """

    @property
    def storage(self) -> str:
        return self.master or ("fp64" if self.compute == "fp64" else "fp32")


def any_layer(weight: str) -> str:
    """blocks.3.ffn.up.weight → blocks.*.ffn.up.weight; other names unchanged."""
    return re.sub(r"^blocks\.\d+\.", "blocks.*.", weight)


class Multiplier(Section):
    """Factors on a weight's learning rate, decay, epsilon and part of the gradient norm."""

    lr: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the learning rate."""
    weight_decay: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the weight decay."""
    eps: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the optimizer's epsilon."""
    norm: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the weight's part of the gradient norm."""


class Group(Section):
    """Settings of the weights that `match` finds. Factors of several entries multiply; the last `frozen` that is given holds."""

    match: str
    """Weights: a pattern of names, such as `blocks.*.attention.q.weight` (`*` also crosses dots), or a role, such as `embedding`."""
    lr: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the weight decay. 0: none."""
    eps: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the optimizer's epsilon."""
    frozen: bool | None = None
    """The weights stay as they are: no update, no decay, no part in the gradient norm. Their optimizer state is kept, so that a phase may
    thaw them with `frozen: false`.
    """


class Muon(Section):
    """Settings of the matrices that an optimizer orthogonalizes (`muon`, `normuon`)."""

    lr: Annotated[float, Field(gt=0)] | None = None
    """Their peak rate, on the schedule of all others. Default: `optim.lr`."""
    momentum: Share | None = None
    """Decay rate of the momentum. Default: the first of `optim.betas`."""
    nesterov: bool = True
    """Orthogonalize the momentum as it will be one step later."""
    rounds: Annotated[int, Field(ge=1, le=100)] = 5
    """Newton–Schulz rounds."""
    coefficients: Literal["jordan", "polar_express"] | tuple[tuple[float, float, float], ...] = "jordan"
    """Polynomials aX + b(XXᵀ)X + c(XXᵀ)²X of the rounds: Jordan's; Polar Express (arXiv 2505.16932), which differ by round and
    converge; or a list of [a, b, c]. Rounds beyond a list repeat its last.
    """
    scale: Literal["match_adamw", "spectral", "none"] = "match_adamw"
    """Size of a step at rate 1: 0.2·√max(rows, columns), about AdamW's; √max(1, rows/columns), which keeps its effect on activations over
    widths; or 1.
    """
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Their decoupled decay. Default: `optim.weight_decay`."""

    @model_validator(mode="after")
    def _some(self) -> Muon:
        if self.coefficients == ():
            raise ValueError("coefficients is an empty list: name jordan or polar_express, or list at least one [a, b, c]")
        return self


class Transfer(Section):
    """Rules by which rates tuned on a small model hold for a larger one."""

    width: Literal["mup"] | None = None
    """μP (arXiv 2203.03466), from `base_width` on: rates and initial values of hidden matrices, a factor on the last hidden state."""
    depth: Literal["completep"] | None = None
    """CompleteP (arXiv 2505.01618), from `base_depth` on: branches are multiplied by base_depth ÷ num_layers."""


class Optim(Section):
    name: Annotated[str, RowName(optimizers)] = "adamw"
    """Optimizer. Muon and NorMuon update matrices and leave embeddings, norms and biases to AdamW; `schedule_free` is AdamW with an average
    in place of a decay (arXiv 2405.15682).
    """
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay rates of the first and second moment. Muon's momentum is the first; NorMuon's second moments of rows use the second."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Epsilon of AdamW."""
    moments: Literal["bf16", "int8"] | None = None
    """Number format of AdamW's moments. Default: that of the stored weights. `bf16` halves them; `int8` keeps those of hidden matrices in 8
    bits with a scale for each block of up to 256 (arXiv 2110.02861).
    """
    muon_dtype: Literal["bf16"] | None = None
    """Number format in which Muon orthogonalizes. Default: that of the stored weights. `bf16`, as in torch.optim.Muon, is about ten times
    as fast on a GPU and halves what owners exchange.
    """
    muon: Muon | None = None
    """`muon` and `normuon` only: settings of the matrices. Default: all of the defaults below."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay. Norms and biases do not decay."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up from zero."""
    decay: Annotated[str, RowName(decays)] = "cosine"
    """Learning-rate schedule after the warm-up: `wsd` is constant, then falls over the last `decay_steps`; `1-sqrt` falls as 1 − √x and
    `power` as (1 − x)^`decay_power` with progress x.
    """
    wsd_decay: Literal["linear", "cosine", "1-sqrt", "power"] = "linear"
    """How `decay: wsd` falls."""
    decay_power: Annotated[float, Field(gt=0)] = 2.0
    """The exponent of `power`."""
    decay_steps: Positive | None = None
    """Step at which the decay ends (default: the last), or the length of the final decay under `wsd`. It counts from the schedule's first
    step, like the warm-up.
    """
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Final learning rate as a share of the peak."""
    schedule_by: Literal["steps", "tokens"] = "steps"
    """What the schedule counts. `tokens`: a phase with larger batches passes through warm-up and decay in fewer steps; `warmup_steps` and
    `decay_steps` then count steps of the batch with which the schedule begins.
    """
    base_width: Positive | None = None
    """Hidden size for which `lr` was tuned, under `transfer.width` or `residual: mus`; there rates of hidden matrices follow the width,
    except Muon's.
    """
    base_depth: Layers | None = None
    """Number of layers for which `lr` was tuned, under `transfer.depth`."""
    transfer: Transfer | None = None
    """Carry the learning rate over to other widths and depths. It also sets `model.init_base`, `head_scale` and `layer_coefficients`."""
    independent_decay: bool = False
    """A step keeps 1 − weight_decay·lr/peak_lr of a weight, so that the decay does not depend on the peak rate."""
    multipliers: dict[str, Multiplier] = Field(default_factory=dict)
    """Factors by weight, such as `head.weight` or `blocks.*.attention.q.weight`. Growth writes them, so that grown weights move as before.
    """
    ema: Annotated[tuple[Ema, ...], BeforeValidator(listed), AfterValidator(different), OneOrMany()] = ()
    """Exponential moving averages of the weights: a list of `{decay: 0.999}`, `{half_life: 1000 steps}` or `{half_life: 1e9}` (tokens). One
    may stand without the list, and a number for its decay. They change nothing in the run.
    """
    ema_valid: bool = True
    """An evaluation also measures every average."""

    groups: tuple[Group, ...] = ()
    """Factors by pattern or role, and weights that are frozen. Factors multiply with each other and with `multipliers`."""

    @property
    def transfer_width(self) -> int | None:
        """The base of a width that μP transfers from."""
        return self.base_width if self.transfer is not None and self.transfer.width is not None else None

    @property
    def transfer_depth(self) -> int | None:
        return self.base_depth if self.transfer is not None and self.transfer.depth is not None else None

    @property
    def orthogonal(self) -> Muon:
        """The settings of orthogonalized matrices."""
        return self.muon or Muon()

    def multiplier(self, weight: str) -> Multiplier:
        """The entry for the weight's own name, or for its name in any layer."""
        return self.multipliers.get(weight, self.multipliers.get(any_layer(weight), Multiplier()))


class DataSource(Section):
    path: str
    """Prefix of the token files: PREFIX.bin and PREFIX.idx."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Relative share of the samples."""
    name: str | None = None
    """Name in metrics and checkpoints. Default: the last part of the path."""


class Data(Section):
    train: str | list[DataSource | str]
    """Training data: a prefix of token files, a list of them with weights, or a YAML file with such a list."""
    valid: str | list[DataSource | str] | None = None
    """Validation data, in the same forms. Each source gets a loss of its own."""
    valid_fraction: Share = 0.0
    """Share of the training documents that is held out for validation by a fixed hash. Set either this or `valid`."""
    order: Literal["megascale", "megatron"] = "megascale"
    """Sample order: megascale's own, or that of megatron-core's GPTDataset and blends."""
    chunk: Positive | None = None
    """Tokens in a piece of data from which samples of several lengths are cut, so that phases with other lengths of a sequence repeat
    nothing. Default: the longest `train.seq_len` of the run's phases, if they differ.
    """
    objective: Literal["translation", "span_corruption"] | None = None
    """Training objective of an `encoder_decoder`. Default: translation."""
    mask_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of tokens that an encoder must predict, or that spans hide. Default: 0.15."""
    mask_token: NonNegative | None = None
    """Token that hides others from an encoder. Default: an extra one after the tokenizer's, the last of the vocabulary."""
    start_token: NonNegative | None = None
    """Token that starts the targets of an `encoder_decoder`. Default: the end token; T5 uses its padding, 0."""
    mark_token: NonNegative | None = None
    """Token that marks the first hidden span; the next spans count down from it. Default: after the tokenizer's own; T5 uses 32099."""
    mean_span: Annotated[float, Field(ge=1)] | None = None
    """Mean length of a hidden span in tokens. Default: 3."""
    tokenizer: str | None = None
    """Tokenizer file. Default: the one next to the first prefix."""
    source_tokenizer: str | None = None
    """Tokenizer of the sources in a translation without `share_embeddings`."""

    @property
    def masked(self) -> float:
        """The share of tokens to predict."""
        return self.mask_fraction or 0.15


def _name(value: Any) -> Any:
    """An average's name may be a number."""
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class Checkpoint(Section):
    every: NonNegative = 0
    """Steps between checkpoints. 0: only at the end."""
    keep_last: Positive = 3
    """Number of newest checkpoints to keep."""
    keep_every: Positive | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    asynchronous: bool = Field(default=True, alias="async")
    """Write checkpoints in a background thread while training continues."""
    resume: str = "auto"
    """`auto` resumes from the newest whole checkpoint of the run, `never` starts anew; a folder names a checkpoint or another run."""
    init_from: str | None = None
    """Start a new run from these weights: a checkpoint or a Hugging Face folder."""
    init_ema: Annotated[str | None, BeforeValidator(_name)] = None
    """With `init_from`: start from this average of that run's `optim.ema`, by its decay, its half-life or its number, from 1."""
    init_schedule: Literal["given", "lemon"] = "given"
    """With `init_from`: the schedule as given, or LEMON's for grown models (warm up again, then decay within 0.6 of the run)."""
    init_data: Literal["restart", "continue"] = "restart"
    """With `init_from`: start the data anew, or continue where the other run stopped."""
    export: Literal["none", "hf"] = "none"
    """Also write a Hugging Face folder, `hf/`, next to every kept checkpoint."""
