"""A tiny model trained for a few steps on any layout, gathered whole: what the layout tests compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.comm.collectives import all_gather
from megascale.comm.mesh import Mesh
from megascale.config.schema import Config, Data, Model, Optim, Parallel, Precision, Run, Spacetime, Train
from megascale.data.loader import Batch, sample_numbers
from megascale.model.layers import Fp8
from megascale.model.shape import DTYPES
from megascale.parallel.model import ParallelModel, Weight
from megascale.train.build import build_engine, draw_model
from megascale.train.engines.engine import backward, update

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
            train=Train(steps=self.steps, clip=self.clip, **sizes, **batch),
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
    """Random tokens that depend on the sample number only; with `packed` random documents and uncounted targets. Sources end anywhere."""
    if case.model.spacetime is not None:
        return fake_fields(case, case.model.spacetime, numbers)
    vocab = case.model.vocab_size
    assert vocab is not None
    rows, documents = [], []
    for n in numbers:
        generator = torch.Generator().manual_seed(1000 + n)
        rows.append(torch.randint(0, vocab, (case.seq_len + 1,), generator=generator))
        documents.append((torch.rand(case.seq_len, generator=generator) < 0.2).cumsum(0))
    tokens, docs = torch.stack(rows), torch.stack(documents)
    targets = tokens[:, 1:].clone()
    positions = None
    if case.packed:
        targets[:, :-1][docs[:, 1:] != docs[:, :-1]] = -1
        begins = torch.where(docs != torch.nn.functional.pad(docs[:, :-1], (1, 0), value=-1), torch.arange(case.seq_len), 0)
        positions = torch.arange(case.seq_len) - begins.cummax(1).values
    targets[torch.tensor(numbers) < 0] = -1
    source = None
    if case.model.encoder_layers:
        source = fake_texts(numbers, case.source_len, case.model.source_vocab_size or vocab)
        targets[torch.arange(case.seq_len) > 3 + torch.tensor(numbers)[:, None] % case.seq_len] = -1
    return Batch(
        tokens[:, :-1],
        targets,
        docs if case.packed else None,
        positions,
        torch.tensor(numbers),
        int((targets >= 0).sum()),
        source,
    )


def fake_texts(numbers: list[int], places: int, vocab: int) -> Tensor:
    """[b, places] tokens that depend on the sample number only, −1 beyond an end of its own; an empty place has none."""
    source = torch.full((len(numbers), places), -1)
    for row, n in enumerate(numbers):
        length = 1 + (5 * n + 2) % places if n >= 0 else 0
        source[row, :length] = torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(5000 + n))
    return source


def fake_fields(case: Case, fields: Spacetime, numbers: list[int]) -> Batch:
    """Random fields that depend on the sample number only, a random half of the patches counted where some are hidden."""
    samples, counted = [], []
    for n in numbers:
        generator = torch.Generator().manual_seed(1000 + n)
        samples.append(torch.randn(fields.frames, *fields.shape[1:], fields.channels, generator=generator, dtype=torch.float64))
        some = torch.rand(fields.tokens, generator=generator) < 0.5
        counted.append(some & (n >= 0) if fields.objective == "masked" else torch.full_like(some, n >= 0))
    targets = torch.stack(counted).to(torch.int64) - 1
    valid, text = int((targets >= 0).sum()), None
    if fields.text_len is not None and fields.text_vocab_size is not None:
        text = fake_texts(numbers, fields.text_len, fields.text_vocab_size)
    return Batch(torch.stack(samples).to(DTYPES[case.precision]), targets, None, None, torch.tensor(numbers), valid, text)


def build(case: Case, ranks: int, device: torch.device = CPU) -> ParallelModel:
    return draw_model(case.config, ranks, device)


def gather_whole(local: Tensor, w: Weight, mesh: Mesh) -> Tensor:
    """A tensor shaped like the weight's local part → the unsharded one, on every rank."""
    placement = w.placement
    if w.sharded:
        axis, dim, length = mesh[placement.shard], placement.shard_dim, placement.shape[placement.shard_dim]
        padded = local.new_zeros([-(-length // axis.size) if i == dim else n for i, n in enumerate(local.shape)])
        padded.narrow(dim, 0, local.shape[dim]).copy_(local)
        local = all_gather(padded, axis, dim).narrow(dim, 0, length)
    for cut in placement.cuts:
        local = all_gather(local, mesh[cut.axis], cut.dim)
    return local


def whole(model: ParallelModel, of: str) -> dict[str, Tensor]:
    """Every weight ("local") or gradient ("local_grad") unsharded, padding cut off."""
    result = {}
    for w in model.weights:
        tensor = gather_whole(getattr(w, of), w, model.mesh)
        result[w.name] = tensor[tuple(slice(0, n) for n in w.placement.spec.shape)].clone()
    if model.mesh["pp"].size > 1:
        stages: list[dict[str, Tensor]] = [{} for _ in range(model.mesh["pp"].size)]
        dist.all_gather_object(stages, result, group=model.mesh["pp"].group)
        result = {name: tensor for stage in stages for name, tensor in stage.items()}
    return result


def train(case: Case) -> dict[str, Any]:
    """losses and norms by step, gradients of the first step, weights at the end, bytes and calls of the last step."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    model = build(case, ranks)
    engine = build_engine(model, case.config, CPU)
    scale = case.loss_scale / (case.batch * case.seq_len)
    result: dict[str, Any] = {"loss": [], "norm": []}
    mesh = model.mesh
    for step in range(case.steps):
        rows = sample_numbers(step * case.batch, case.batch, case.micro_batch, mesh.data_rank, mesh.data_size)
        batches = [fake_batch(case, row) for row in rows]
        mesh.traffic.take()
        sums = backward(engine, batches, scale, case.optim.lr)
        result["sent"], result["calls"] = mesh.traffic.take()
        if step == 0 and case.keep_tensors:
            result["grad"] = whole(model, "local_grad")
        done = update(engine, sums)
        result["loss"].append(done.loss.item())
        result["norm"].append(done.norm.item())
    if case.keep_tensors:
        result["weight"] = whole(model, "local")
    if ranks > 1 and dist.get_rank() > 0:
        return {"sent": result["sent"], "calls": result["calls"]}
    return result


def worst(got: dict[str, Tensor], reference: dict[str, Tensor], allowed: dict[str, Tensor] | None = None) -> tuple[float, str]:
    """The largest max|Δ|/max|ref| of a tensor, and which one it is. Of |Δ| counts what is beyond `allowed`, entry by entry.

    A tensor that is zero but for rounding (the gradient of a key bias: softmax ignores it) has no scale of its own; a hundredth of the
    largest tensor's serves for it.
    """
    assert got.keys() == reference.keys()
    floor = 0.01 * max(r.abs().max().item() for r in reference.values())
    beyond = {n: (got[n] - r).abs() - (0.0 if allowed is None else allowed[n]) for n, r in reference.items()}
    return max((beyond[n].max().item() / max(r.abs().max().item(), floor), n) for n, r in reference.items())
