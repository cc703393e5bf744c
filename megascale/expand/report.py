"""The report of a growth as data: the source of every tensor, coverage, and changes of the config."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from megascale.checkpoint.index import Index
from megascale.config.load import flatten
from megascale.config.schema import Config
from megascale.expand.plan import Growth
from megascale.expand.source import GrowthSource
from megascale.expand.stack import specs
from megascale.expand.tensors import TensorPlan


def describe(growth: Growth, source: GrowthSource, config: Config, index: Index) -> dict[str, Any]:
    """The part of the report that follows from the plan and from the `index` of the written checkpoint."""
    was, now = flatten({"model": source.model.model_dump(mode="json")}), flatten({"model": config.model.model_dump(mode="json")})
    changed = {k: [was.get(k), now.get(k)] for k in sorted({*was, *now}) if was.get(k) != now.get(k)}
    parameters = [sum(t.numel for t in _specs(growth, name)) for name in ("source", "target")]
    return {
        "parameters": {"source": parameters[0], "target": parameters[1]},
        "config": {**changed, **({} if growth.seq_lens[0] == growth.seq_lens[1] else {"train.seq_len": list(growth.seq_lens)})},
        "layers": [{"from": layer.source, "as": layer.mode} for layer in growth.layers],
        "lossy": list(growth.lossy),
        "dead": list(growth.dead),
        "notes": list(growth.notes),
        "coverage": coverage(growth, source, index),
        "tensors": {t.name: {"from": t.source, "formula": t.formula, "hash": plan_hash(growth, t)} for t in growth.tensors},
    }


def _specs(growth: Growth, which: str) -> list[Any]:
    model, seq_len = (growth.source, growth.seq_lens[0]) if which == "source" else (growth.target, growth.seq_lens[1])
    return [s for s in specs(model, seq_len).values() if s.role != "coefficient"]


def coverage(growth: Growth, source: GrowthSource, index: Index) -> dict[str, Any]:
    """Of the target: elements written (an index is read only if its chunks fill every tensor once). Of the source: the share of every
    tensor that the plan does not use.
    """
    used: dict[str, float] = {}
    for t in growth.tensors:
        if t.source is not None and t.drawn is None:
            share = 1.0
            for axis in growth.axes_of(t):
                share *= 1 - axis.unused / axis.old
            used[t.source] = max(used.get(t.source, 0.0), share)
    dropped = {n: round(1 - used.get(n, 0.0), 6) for n in source.shapes if used.get(n, 0.0) < 1.0 and not _constant(growth, n)}
    elements = sum(t.spec.numel for t in growth.tensors)
    written = sum(index.tensors[f"model.{t.name}"].numel for t in growth.tensors)
    return {"target": written / elements, "target_elements": elements, "source_dropped": dropped}


def _constant(growth: Growth, name: str) -> bool:
    """Coefficients are in the config; another tensor takes norms whose affine part moved."""
    return name.endswith((".skip", ".branch"))


def plan_hash(growth: Growth, plan: TensorPlan) -> str:
    """Hash of everything besides the source that determines a tensor's elements: equal plans on equal sources give equal bits."""
    digest = hashlib.sha256(f"{plan} {growth.symmetry} {growth.seed}".encode())
    for axis in growth.axes_of(plan):
        digest.update(np.ascontiguousarray(axis.source).tobytes() + np.ascontiguousarray(axis.weight).tobytes())
    return digest.hexdigest()[:16]
