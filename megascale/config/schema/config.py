"""The whole config, and its sections `run` and `grow`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from megascale.config.schema.model import Model
from megascale.config.schema.parallel import Parallel
from megascale.config.schema.section import Layers, Positive, Seconds, Section, Seed, Threads
from megascale.config.schema.train import Checkpoint, Data, Optim, Precision, Train


def _one_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", value) or not value.strip("."):
        raise ValueError(f"{value!r} is no name of a folder: give up to 200 letters, digits, '.', '_' and '-'")
    return value


class Run(Section):
    name: Annotated[str, AfterValidator(_one_name)] = Field(default="run", max_length=200)
    dir: str | None = None  # runs/<name> if absent
    seed: Seed = 1234
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Threads | None = None  # CPU threads of a rank; its share of the cores that it may use if absent, alone also OMP_NUM_THREADS
    kernels: Literal["auto", "torch", "apex", "te"] = "auto"
    peak_tflops: Annotated[float, Field(gt=0)] | None = None  # of one rank, for MFU; known for common GPUs, measured on CPUs
    profile_step: Positive | None = None  # write a profiler trace of this step
    collective_timeout: Seconds = 600.0  # seconds until a silent peer counts as lost
    wandb: bool = False
    tensorboard: bool = False
    allow_change: list[str] = Field(default_factory=list)


class GrowAt(Section):
    """A growth after step `step`; sizes and methods are the flags of tools/grow.py. `parallel`: the layout from then on."""

    step: Positive
    hidden_size: Positive | None = None
    num_heads: Positive | None = None
    num_kv_heads: Positive | None = None
    head_dim: Positive | None = None
    ffn_size: Positive | None = None
    expert_ffn_size: Positive | None = None
    num_layers: Layers | None = None
    num_experts: Positive | None = None
    top_k: Positive | None = None
    granularity: Positive = 1
    tokenformer_size: Positive | None = None
    width_method: Literal["duplicate", "zero", "average"] = "duplicate"
    ffn_method: Literal["duplicate", "zero"] = "duplicate"
    heads_method: Literal["duplicate", "zero"] = "duplicate"
    depth_method: Literal["identity", "cancel", "stack", "dus", "interleave", "inject"] = "identity"
    placement: Literal["spread", "end"] = "spread"
    symmetry: str = "project"
    split: tuple[float, float] = (1.0, 1.0)
    optimizer: Literal["transform", "reset"] = "transform"
    router: Literal["topk_softmax", "softmax_topk", "sigmoid", "sigma", "xmoe"] = "topk_softmax"
    lossless: Literal["require", "prefer", "off"] = "prefer"
    parallel: Parallel | None = None


class Config(Section):
    run: Run = Run()
    model: Model
    parallel: Parallel = Parallel()
    train: Train
    optim: Optim = Optim()
    data: Data
    checkpoint: Checkpoint = Checkpoint()
    precision: Precision = Precision()
    grow: tuple[GrowAt, ...] = ()  # in the order of their steps

    def plain(self) -> dict[str, Any]:
        """The resolved config as nested dicts of JSON values, with the keys that a YAML file uses."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def run_dir(self) -> str:
        return self.run.dir or f"runs/{self.run.name}"
