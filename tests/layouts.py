"""A tiny model trained for a few steps on any layout, gathered whole: what the layout tests compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megascale.config.schema import Config, Data, Model, Optim, Parallel, Precision, Run, Train
from megascale.config.schema.train import SkipSpikes
from megascale.data.loader import Batch
from megascale.model.layers import Fp8
from megascale.parallel.model import ParallelModel
from megascale.train.build import build_engine, draw_model
from megascale.verify.samples import random_batch
from megascale.verify.steps import run_steps, whole, worst

__all__ = ["CPU", "Case", "build", "fake_batch", "tiny", "train", "whole", "worst"]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One training: everything but `parallel` must leave the outcome as it is."""

    model: Model
    parallel: Parallel = Parallel()
    optim: Optim = Optim(lr=1e-3)
    precision: str = "fp64"
    fp8: Fp8 = "false"
    reduce: str | None = None
    shadows: bool | None = None
    loss_scale: float = 1.0
    seq_len: int = 12
    source_len: int = 8  # of an encoder_decoder
    batch: int = 4
    micro_batch: int = 1
    steps: int = 3
    packed: bool = False
    clip: float = 0.5
    keep_tensors: bool = True
    spikes: SkipSpikes | None = None

    @property
    def config(self) -> Config:
        """The same as a run's config: what the core builds model and engine from."""
        fp8 = {"fp8": "dynamic", "fp8_recipe": self.fp8} if self.fp8 in ("tensorwise", "rowwise") else {"fp8": self.fp8}
        sizes: dict[str, Any] = {"seq_len": self.seq_len}
        if self.model.encoder_layers:  # rules refuse it elsewhere
            sizes["source_len"] = self.source_len
        batch: dict[str, Any] = {"global_batch_size": self.batch, "micro_batch_size": self.micro_batch}
        return Config(
            run=Run(seed=7, kernels="torch"),
            model=self.model,
            parallel=self.parallel,
            train=Train(steps=self.steps, clip=self.clip, skip_spikes=self.spikes, **sizes, **batch),
            optim=self.optim,
            data=Data(train="none"),
            precision=Precision(compute=self.precision, reduce=self.reduce, shadow_weights=self.shadows, **fp8),  # type: ignore[arg-type]
        )


def tiny(**changes: Any) -> Model:
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 24,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_size": 32,
        "vocab_size": 37,
    }
    return Model(**{**sizes, "init_std": 0.2, **changes})


def fake_batch(case: Case, numbers: list[int]) -> Batch:
    return random_batch(case.config, numbers, case.packed)


def build(case: Case, ranks: int, device: torch.device = CPU) -> ParallelModel:
    return draw_model(case.config, ranks, device)


def train(case: Case) -> dict[str, Any]:
    """losses and norms by step, gradients of the first step, weights at the end, bytes and calls of the last step."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    model = build(case, ranks)
    engine = build_engine(model, case.config, CPU)
    scale = case.loss_scale / (case.batch * case.seq_len)
    result = run_steps(case.config, model, engine, scale, case.keep_tensors, case.packed)
    if ranks > 1 and dist.get_rank() > 0:
        return {"sent": result["sent"], "calls": result["calls"]}
    return result
