"""Grows a checkpoint: plan, proof in fp64, workers write slabs, proof of the stored model, report."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megascale.checkpoint.index import read_index
from megascale.checkpoint.streaming import Progress
from megascale.config.schema import Config, Multiplier, Parallel, any_layer
from megascale.config.support import refusals
from megascale.errors import UsageError
from megascale.expand.options import GrowthOptions, Sizes
from megascale.expand.plan import Growth, plan_growth
from megascale.expand.produce import GrownTensors
from megascale.expand.proof import prove, prove_stored, some_tokens
from megascale.expand.report import describe
from megascale.expand.source import open_source, renamed
from megascale.expand.state import check_state_grows, multipliers
from megascale.expand.verify import EXACT, limit
from megascale.expand.write import Effort, check_target, finish, write
from megascale.optim.rates import follows_width


def grow(
    source: str | Path, target: Path, sizes: Sizes, options: GrowthOptions, effort: Effort, progress: Progress | None = None
) -> dict[str, Any]:
    """Writes the grown checkpoint into `target` and returns the report. Raises UsageError before anything is written, and TrainingError if
    the source turns out to be damaged; then nothing is left.
    """
    begun = time.perf_counter()
    opened = open_source(source, effort.check)
    growth = plan_growth(opened.model, opened.seq_len, sizes, options)
    refuse_nothing(growth, options)
    check_state_grows(opened.config.optim.name, options.optimizer)
    made = GrownTensors(growth, opened.index, options.optimizer, kept_by=opened.config.optim.name)
    written = check_target(target, opened, made)
    config, factors, uneven = grown_config(opened.config, growth, options)
    growth = replace(growth, notes=(*growth.notes, *precision_notes(opened.config, config)))
    tokens = some_tokens(opened, effort) if effort.tokens else None
    proof: dict[str, Any] = {"tokens": None if tokens is None else tokens[1], "exact": f"fp64, before storing, at most {EXACT:g}"}
    if tokens is not None:
        proof["transform"] = prove(opened, growth, GrownTensors(growth, opened.index, dtype=torch.float64), tokens[0])
        if not math.isfinite(proof["transform"]["logits_max"]):
            raise UsageError(
                f"the logits of {source} or of the grown model are not finite in fp64, so nothing can be proven: use an older "
                "checkpoint, or milder --symmetry and --split; no checkpoint was made"
            )
        if options.lossless == "require" and not proof["transform"]["logits_max"] <= limit(proof["transform"]["logits_std"]):
            raise UsageError(
                f"the grown model's logits differ by {proof['transform']['logits_max']:.1e} in fp64 but --lossless require allows {EXACT:g}"
                f" (first diverging layer: {proof['transform']['first_diverging_layer']}); no checkpoint was made"
            )
    how = {"by": "grow", "optimizer": options.optimizer}
    index = write(opened, target, made, config, how, effort, progress) if written is None else read_index(written)
    if tokens is not None:
        proof |= prove_stored(opened, growth, index, tokens[0], proof["transform"])
        if options.lossless == "require" and proof["verdict"] == "lossy":
            shutil.rmtree(target)
            raise UsageError(
                f"stored in {config.precision.storage} and computed in {proof['dtype']}, logits typically move by "
                f"{proof['stored_error_typical']:.1e} and rounding allows {proof['stored_error_allowed']:.1e} (numbers as stored are "
                f"{proof['stored_units']:.1f} units in the last place from exact ones), and --lossless require refuses that; nothing is "
                f"left in {target}"
            )
    finish(target, config)
    return {
        "source": str(opened.index.folder),
        "target": str(index.folder),
        "verdict": proof.get("verdict", "lossy" if growth.lossy else "unproven"),
        **describe(growth, opened, config, index),
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


def refuse_nothing(growth: Growth, options: GrowthOptions) -> None:
    """Raises UsageError for a growth that changes nothing."""
    same = (growth.target, growth.seq_lens[1]) == (growth.source, growth.seq_lens[0])
    if same and options.vocabulary is None:
        raise UsageError("nothing grows: name a size that is larger than the source's, such as --num-layers or --hidden-size")


def grown_config(config: Config, growth: Growth, options: GrowthOptions) -> tuple[Config, dict[str, Multiplier], list[str]]:
    """The target's config, the multipliers by weight, and the names for which these are means. The config has multipliers only with
    transformed optimizer state: fresh state has no steps to preserve.
    """
    factors, uneven = multipliers(growth)
    if config.optim.base_width is not None and config.optim.transfer is None:
        # Unit scaling already changes the rate with the width; do not count it twice.
        ratio = (growth.target.hidden_size / growth.source.hidden_size) ** 0.5
        specs = {name: t.spec for t in growth.tensors for name in (t.name, any_layer(t.name))}
        for name, m in factors.items():
            if name in specs and follows_width(specs[name], config.optim):
                factors[name] = m.model_copy(update={"lr": m.lr * ratio, "weight_decay": m.weight_decay / ratio})
    before = config.optim.multipliers
    optim = config.optim
    if options.optimizer == "transform":
        joined = {n: _product(before.get(n, Multiplier()), factors.get(n, Multiplier())) for n in {**before, **factors}}
        optim = optim.model_copy(update={"multipliers": joined})
    train = config.train.model_copy(update={"seq_len": growth.seq_lens[1]})
    grown = renamed(config, "grown").model_copy(update={"model": growth.target, "optim": optim, "train": train})
    return grown, factors, uneven


def precision_notes(before: Config, after: Config) -> list[str]:
    """Notes on FP8 runs: what the proof leaves out, and rules about sizes that the grown model breaks."""
    if after.precision.fp8 == "false":
        return []
    alone = [c.model_copy(update={"parallel": Parallel()}) for c in (before, after)]
    known = refusals(alone[0], 1)
    refused = [rule for rule in refusals(alone[1], 1) if rule not in known]
    fp8 = f"precision.fp8 {after.precision.fp8}"
    return [
        f"{fp8}: the proof multiplies without FP8, whose casts round other numbers in the grown model than in the small one",
        *(f"training will refuse this model under {fp8}: {rule.why}; {rule.fix}" for rule in refused),
    ]


def _product(a: Multiplier, b: Multiplier) -> Multiplier:
    return Multiplier(lr=a.lr * b.lr, weight_decay=a.weight_decay * b.weight_decay, eps=a.eps * b.eps, norm=a.norm * b.norm)
