"""Growing a checkpoint from start to end: plan, proof in fp64, slabs written by workers, proof of what is stored, report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale.checkpoint.index import read_index
from megascale.checkpoint.loader import verify as verify_files
from megascale.checkpoint.shards import read_slice
from megascale.checkpoint.storage import write_durably
from megascale.checkpoint.streaming import Progress, write_streamed
from megascale.config.identity import identity
from megascale.config.load import to_yaml
from megascale.config.schema import Config, Multiplier
from megascale.data.dataset import Mixture, read_sources
from megascale.errors import TrainingError, UsageError
from megascale.expand.options import Options, Sizes
from megascale.expand.plan import Growth, plan_growth
from megascale.expand.produce import Grown
from megascale.expand.report import describe
from megascale.expand.source import Source, open_source, renamed
from megascale.expand.state import multipliers
from megascale.expand.verify import EXACT, compare, run, verdict
from megascale.model.spec import Role
from megascale.optim.rates import MATRICES

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Effort:
    """How much machine a growth may use, and how much it is checked. None of it changes a bit of the result.

    slab_bytes  of target rows formed at once; a worker holds about three times as much
    tokens      to compare small and grown model on; 0 skips that
    check       read the source's files for their checksums first
    """

    workers: int = 1
    slab_bytes: int = 256 << 20
    tokens: int = 128
    check: bool = True
    data: str | None = None


def grow(
    source: str | Path, target: Path, sizes: Sizes, options: Options, effort: Effort, progress: Progress | None = None
) -> dict[str, Any]:
    """Writes the grown checkpoint into `target` and returns the report. Raises UsageError before anything is written, and TrainingError
    where the source turns out damaged on the way; nothing is left of it then.
    """
    begun = time.perf_counter()
    opened = open_source(source, effort.check)
    growth = plan_growth(opened.model, opened.seq_len, sizes, options)
    made = Grown(growth, opened.index, options.optimizer)
    targets = made.targets()
    check_target(target, opened.index.folder, made.nbytes)
    config, factors, uneven = grown_config(opened.config, growth, options)
    tokens = some_tokens(opened, effort) if effort.tokens else None
    proof: dict[str, Any] = {"tokens": None if tokens is None else tokens[1], "exact": f"fp64, before storing, at most {EXACT:g}"}
    if tokens is not None:
        proof["transform"] = prove(opened, growth, Grown(growth, opened.index, dtype=torch.float64), tokens[0])
        if options.lossless == "require" and proof["transform"]["logits_max"] > EXACT:
            raise UsageError(
                f"the grown model's logits differ by {proof['transform']['logits_max']:.1e} in fp64 and --lossless require allows {EXACT:g}"
                f" (first diverging layer: {proof['transform']['first_diverging_layer']}); nothing was written"
            )
    trainer = {
        **{k: v for k, v in opened.trainer.items() if k not in ("identity", "config")},
        "identity": identity(config),
        "config": config.plain(),
        "grown": {"from": str(opened.index.folder), "stamp": made.stamp, "optimizer": options.optimizer},
    }
    step = opened.trainer.get("step")
    folder = _written(opened, target, step if isinstance(step, int) else 0, targets, made, trainer, effort, progress)
    if tokens is not None:
        proof |= prove_stored(opened, growth, folder, tokens[0], proof["transform"])
        if options.lossless == "require" and proof["verdict"] == "lossy":
            shutil.rmtree(target)
            raise UsageError(
                f"stored in {config.precision.storage}, the logits move by {proof['stored_error']:.1e}, more than twice the model's own "
                f"rounding error of {proof['own_error']:.1e}, and --lossless require refuses that; nothing is left in {target}"
            )
    write_durably(target / "config.yaml", to_yaml(config.plain()).encode())
    return {
        "source": str(opened.index.folder),
        "target": str(folder),
        "verdict": proof.get("verdict", "lossy" if growth.lossy else "unproven"),
        **describe(growth, opened, config),
        "proof": proof,
        "optimizer": {
            "state": options.optimizer,
            "multipliers": {n: m.model_dump() for n, m in factors.items()},
            "in_config": options.optimizer == "transform",
            "approximate": uneven,
            "note": "lr, weight_decay and eps by weight; norm is a weight's part in the gradient norm, so that clip keeps its meaning",
        },
        "bytes": made.nbytes,
        "seconds": round(time.perf_counter() - begun, 2),
    }


def _written(
    opened: Source,
    target: Path,
    step: int,
    targets: list[Any],
    made: Grown,
    trainer: dict[str, Any],
    effort: Effort,
    progress: Progress | None,
) -> Path:
    try:
        return write_streamed(
            target, step, targets, made, trainer, stamp=made.stamp, workers=effort.workers, slab_bytes=effort.slab_bytes, progress=progress
        )
    except UsageError as error:
        if problems := verify_files(opened.index):
            raise TrainingError(
                f"the source was found damaged on the way: {'; '.join(problems)}; {target} was not made, use another checkpoint"
            ) from error
        raise


def check_target(target: Path, source: Path, nbytes: int) -> None:
    """Raises UsageError where the target holds something else, lies in the source, or has no room. A killed growth's folder is welcome."""
    if target.exists() and (not target.is_dir() or any(not p.name.startswith(".tmp-") for p in target.iterdir())):
        raise UsageError(f"{target} exists already: name a folder that does not, or remove it")
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise UsageError(f"{target} lies in the source {source}: name a folder beside it")
    place = next(p for p in (target, *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free + sum(f.stat().st_size for f in target.glob(".tmp-*/*") if f.is_file())
    if free < nbytes:
        raise UsageError(f"{target} needs {nbytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: make room, or name another disk")


def grown_config(config: Config, growth: Growth, options: Options) -> tuple[Config, dict[str, Multiplier], list[str]]:
    """The target's config, the multipliers by weight, and the names for which these are means. The config has them with transformed
    optimizer state only: fresh state has no steps to keep.
    """
    factors, uneven = multipliers(growth)
    if config.optim.base_width is not None:
        # The width's own rate changes already; what a matrix moves by must not count it twice.
        ratio = (growth.target.hidden_size / growth.source.hidden_size) ** 0.5
        roles: dict[str, Role] = {t.name: t.spec.role for t in growth.tensors}
        for name, m in factors.items():
            if roles.get(name.replace("*", "0")) in (*MATRICES, "router"):
                factors[name] = m.model_copy(update={"lr": m.lr * ratio, "weight_decay": m.weight_decay / ratio})
    before = config.optim.multipliers
    optim = config.optim
    if options.optimizer == "transform":
        joined = {n: _product(before.get(n, Multiplier()), factors.get(n, Multiplier())) for n in {**before, **factors}}
        optim = optim.model_copy(update={"multipliers": joined})
    train = config.train.model_copy(update={"seq_len": growth.seq_lens[1]})
    grown = renamed(config, "grown").model_copy(update={"model": growth.target, "optim": optim, "train": train})
    return grown, factors, uneven


def _product(a: Multiplier, b: Multiplier) -> Multiplier:
    return Multiplier(lr=a.lr * b.lr, weight_decay=a.weight_decay * b.weight_decay, eps=a.eps * b.eps, norm=a.norm * b.norm)


def some_tokens(source: Source, effort: Effort) -> tuple[Tensor, str]:
    """Tokens [b, s] to compare the models on, and what they are: of the given data, of the source's own, or random where that is gone."""
    if source.model.spacetime is not None:
        fields = source.model.spacetime
        shape = (1, fields.frames, *fields.shape[1:], fields.channels)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)), "random fields"
    vocab = source.model.vocab_size
    assert vocab is not None
    length = min(source.seq_len, effort.tokens)
    count = max(1, effort.tokens // length)
    try:
        sources = read_sources(effort.data or source.config.data.train, "data.train")
        samples = Mixture(sources, length, 0, vocab, "all", 0.0, True)
        rows = [torch.from_numpy(samples.sample(n)[0][:-1].astype("int64")) for n in range(count)]
        return torch.stack(rows), f"{count} × {length} tokens of {', '.join(s.path for s in sources)}"
    except UsageError:
        if effort.data is not None:
            raise
    drawn = torch.randint(0, vocab, (count, length), generator=torch.Generator().manual_seed(0))
    return drawn, f"{count} × {length} random tokens, the source's data not being here"


def prove(opened: Source, growth: Growth, made: Grown, tokens: Tensor) -> dict[str, Any]:
    """Both models in fp64, the grown one straight from the transform."""

    def new(name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        return made(f"model.{name}", offset, shape)

    small = run(growth.source, growth.seq_lens[0], opened.read, torch.float64, tokens)
    return compare(growth, small, run(growth.target, growth.seq_lens[1], new, torch.float64, tokens), tokens)


def prove_stored(opened: Source, growth: Growth, folder: Path, tokens: Tensor, transform: dict[str, Any]) -> dict[str, Any]:
    """Both models in the run's dtype, the grown one as it is stored, against the small one in fp64."""
    dtype, index = COMPUTE[opened.config.precision.compute], read_index(folder)

    def stored(name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        return read_slice(index, f"model.{name}", offset, shape)

    no_streams: Callable[[int], bool] = lambda layer: False  # noqa: E731
    quick = partial(run, tokens=tokens, keep=no_streams)
    true = quick(growth.source, growth.seq_lens[0], opened.read, torch.float64)
    small = quick(growth.source, growth.seq_lens[0], opened.read, dtype)
    grown = quick(growth.target, growth.seq_lens[1], stored, dtype)
    own = (small.logits.to(torch.float64) - true.logits).abs().max().item()
    against = compare(growth, true, grown, tokens)
    return {
        "dtype": opened.config.precision.compute,
        "own_error": own,
        "stored_error": against["logits_max"],
        "stored_loss_change": against.get("loss_change"),
        "verdict": verdict(transform["logits_max"], against["logits_max"], own, transform["logits_std"]),
    }
