"""The whole config, and its sections `run` and `grow`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from megascale.config.routers import routers
from megascale.config.schema.evaluate import EvaluateAt
from megascale.config.schema.kinds import Model
from megascale.config.schema.model_parts import InitBase
from megascale.config.schema.parallel import Parallel
from megascale.config.schema.row_name import RowName
from megascale.config.schema.section import Layers, NonNegative, Positive, Seconds, Section, Seed, Threads, steps_or_tokens
from megascale.config.schema.train import Checkpoint, Data, Optim, Precision, Train

NAME = r"(?=.*[^.])[A-Za-z0-9._-]{1,200}"  # a folder's name; excludes "." and ".."


def _one_name(value: str) -> str:
    if not re.fullmatch(NAME, value):
        raise ValueError(f"{value!r} is not a folder name: give up to 200 letters, digits, '.', '_' and '-'")
    return value


def _place(value: Any) -> int | str:
    """A place within a run: tokens, or text such as `1000 steps`."""
    found = steps_or_tokens(value)
    if found is not None:
        return found
    raise ValueError(f"{value!r} is no place within a run: write tokens as a number, such as 1e9, or `1000 steps`")


class Run(Section):
    name: Annotated[str, AfterValidator(_one_name)] = Field(default="run", max_length=200, json_schema_extra={"pattern": f"^{NAME}$"})
    """Name of the run. It is also the folder under `runs/` if `run.dir` is absent."""
    dir: str | None = None
    """Folder for metrics, events, checkpoints and logs. Default: `runs/NAME`."""
    seed: Seed = 1234
    """Seed of the initial weights, the sample order and dropout. With the same config, data and seed, every layout gives the same curve."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks compute. `auto` takes CUDA if a GPU is usable, otherwise the CPU."""
    threads: Threads | None = None
    """CPU threads per rank. Default: the rank's share of the cores it may use; a single process also respects `OMP_NUM_THREADS`."""
    numa: bool = True
    """On a GPU: run only on the cores next to it, of those that the launcher left to the rank."""
    kernels: Literal["auto", "torch", "apex", "te"] = "auto"
    """Implementation of the norms: torch's own, NVIDIA Apex or Transformer Engine. `auto` is torch."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Peak rate of one rank in TFLOP/s, used for MFU. Default: the data sheet of known GPUs; measured at the start on CPUs."""
    profile_step: Positive | None = None
    """Step for which a profiler trace is written."""
    collective_timeout: Seconds = 600.0
    """Seconds after which a silent peer counts as lost and the job ends with exit code 5."""
    start_timeout: Seconds | None = None
    """Seconds that ranks wait for each other until their second step is done: they start at different times, and kernels compile. Default:
    `collective_timeout`.
    """
    gc_every: NonNegative = 100
    """Steps between garbage collections of Python, on all ranks at the same step. 0: whenever Python likes."""
    wandb: bool = False
    """Log metrics to Weights & Biases as well (extra `wandb`)."""
    tensorboard: bool = False
    """Log metrics to TensorBoard as well, under `run.dir`."""
    allow_change: list[str] = Field(default_factory=list)
    """Keys of the run's identity (model, data, optimizer, seed, batch, sequence length) that may change at a resume, such as
    `[data.train]`. Each change is logged.
    """


class GrowAt(Section):
    """A growth after step `step`; sizes and methods are the flags of `megascale grow`. `parallel`: the layout from then on."""

    step: Positive
    """The model grows after this step."""
    hidden_size: Positive | None = None
    """New width of the residual stream. Absent: unchanged, as for every size below."""
    num_heads: Positive | None = None
    """New number of query heads."""
    num_kv_heads: Positive | None = None
    """New number of key-value heads."""
    head_dim: Positive | None = None
    """New channels per head."""
    ffn_size: Positive | None = None
    """New width of the feed-forward."""
    expert_ffn_size: Positive | None = None
    """New width of each expert."""
    num_layers: Layers | None = None
    """New number of layers."""
    num_experts: Positive | None = None
    """New number of experts per layer. A dense model becomes a mixture of experts."""
    top_k: Positive | None = None
    """New number of experts per token."""
    granularity: Positive = 1
    """Cut each expert into this many finer ones."""
    tokenformer_size: Positive | None = None
    """New number of parameter tokens of `model.linear: tokenformer`."""
    kv_rank: Positive | None = None
    """New `model.latent.kv_rank`."""
    query_rank: Positive | None = None
    """New `model.latent.query_rank`."""
    rope_dim: Positive | None = None
    """New `model.latent.rope_dim`."""
    value_dim: Positive | None = None
    """New `value_dim` of `model.latent` or `model.delta`."""
    key_heads: Positive | None = None
    """New `model.delta.key_heads`."""
    value_heads: Positive | None = None
    """New `model.delta.value_heads`."""
    key_dim: Positive | None = None
    """New `model.delta.key_dim`."""
    conv_size: Positive | None = None
    """New `model.delta.conv_size`."""
    mtp_depth: Annotated[int, Field(ge=1, le=3)] | None = None
    """New number of modules of multi-token prediction; those that are added start fresh."""
    kinds: dict[str, dict[str, Positive]] = Field(default_factory=dict)
    """New sizes of one kind of layer, by its name: `{dense: {ffn_size: 8192}}`. `num_layers` is then the number of layers of that kind."""
    width_method: Literal["duplicate", "zero", "average"] = "duplicate"
    """How new channels of the stream start: as copies, as zeros, or as the mean of the others."""
    ffn_method: Literal["duplicate", "zero"] = "duplicate"
    """How new neurons start: as copies that share their output, or with zero outputs."""
    heads_method: Literal["duplicate", "zero"] = "duplicate"
    """How new heads start: as copies that share their output, or with zero outputs."""
    depth_method: Literal["identity", "cancel", "stack", "dus", "interleave", "inject"] = "identity"
    """How new layers start. `identity` and `cancel` keep the function exactly; `stack`, `dus`, `interleave` and `inject` copy trained
    layers and do not.
    """
    placement: Literal["spread", "end"] = "spread"
    """Where new layers go: spread through the depth, or at its end."""
    symmetry: str = "project"
    """What makes copies differ without changing the function: a fresh projection, noise with a signal-to-noise ratio (`snr:DB`, in
    decibels), or `none`.
    """
    split: tuple[float, float] = (1.0, 1.0)
    """Relative shares of the output for the first copy and for each other copy."""
    optimizer: Literal["transform", "reset"] = "transform"
    """Transform the optimizer's state along with the weights, or reset it."""
    router: Annotated[str, RowName(routers)] = "topk_softmax"
    """Router of experts that are made from dense layers."""
    lossless: Literal["require", "prefer", "off"] = "prefer"
    """`require` refuses everything that cannot be exact; `prefer` refuses what has an exact alternative; `off` refuses nothing."""
    parallel: Parallel | None = None
    """The layout from this step on, a whole section `parallel`. Absent: unchanged."""


class PhaseAt(Section):
    """A change of the config within a run."""

    begins: Annotated[int | str, BeforeValidator(_place), Field(alias="from")]
    """Where the phase begins: after so many tokens, such as `1e9`, or after so many steps, such as `1000 steps`."""
    set: Annotated[dict[str, Any], Field(min_length=1)]
    """New values by `section.key`, from here on."""

    @property
    def steps(self) -> int | None:
        """Steps before it; None if it is given in tokens."""
        return int(self.begins.split()[0]) if isinstance(self.begins, str) else None

    @property
    def tokens(self) -> int | None:
        return None if isinstance(self.begins, str) else self.begins


class Config(Section):
    run: Run = Run()
    """The run itself: name, folder, seed, device and logging."""
    model: Model
    """The model's architecture and sizes. Sizes are global, never per rank."""
    parallel: Parallel = Parallel()
    """How the run is laid out over ranks. Nothing here changes the curve."""
    train: Train
    """Length, batch, sequence length and evaluation."""
    optim: Optim = Optim()
    """Optimizer and learning-rate schedule."""
    data: Data
    """Training and validation data."""
    checkpoint: Checkpoint = Checkpoint()
    """When checkpoints are written and what a run starts from."""
    precision: Precision = Precision()
    """Number formats of products and stored weights."""
    evaluate: tuple[EvaluateAt, ...] = ()
    """Evaluations during the run and at its end, beside the validation loss."""
    phases: tuple[PhaseAt, ...] = ()
    """Changes of other keys during the run, in order: batch ramps, longer sequences, other data, another schedule."""
    grow: tuple[GrowAt, ...] = ()
    """Growths during the run, in the order of their steps."""

    @model_validator(mode="after")
    def _transferred(self) -> Config:
        """Fills what `optim.transfer` says of the model, so that a checkpoint's model is complete without the optimizer's settings."""
        model, width, depth = self.model, self.optim.transfer_width, self.optim.transfer_depth
        made: dict[str, Any] = {}
        if width is not None or depth is not None:
            made["init_base"] = InitBase(width=width, depth=depth)
        if width is not None:
            made["head_scale"] = width / model.hidden_size
        if depth is not None:
            made["layer_coefficients"] = ((1.0, depth / model.num_layers),) * model.num_layers
        for key, value in made.items():
            given = getattr(model, key)
            if given is not None and given != value:
                raise ValueError(f"model.{key} is {given}, but optim.transfer makes it {value}: leave model.{key} out, or transfer")
        if made:
            object.__setattr__(self, "model", model.model_copy(update=made))
        return self

    def plain(self) -> dict[str, Any]:
        """The resolved config as nested dicts of JSON values, with the keys that a YAML file uses."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def shadows(self) -> bool:
        """Whether weights that nothing gathers are also kept in the compute dtype."""
        wanted, p = self.precision.shadow_weights, self.parallel
        if p.engine == "deepspeed" or "parameters" in p.offload or self.precision.compute == self.precision.storage:
            return False
        return p.recompute not in ("full", "nested") if wanted is None else wanted

    @property
    def run_dir(self) -> str:
        return self.run.dir or f"runs/{self.run.name}"
