"""Weights kept in the compute dtype beside their masters: the same numbers as casting them in every product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.config.schema import Moe, Optim, Parallel
from megascale.train.build import build_engine
from megascale.train.engines.engine import backward, update
from tests.layouts import CPU, Case, build, fake_batch, tiny, train
from tests.ranks import run_ranks

MODEL = tiny(ffn_size=40)
TIED = tiny(tie_embeddings=True)
CASES = {
    "adamw": Case(MODEL, precision="bf16"),
    "tied, mtp": Case(tiny(tie_embeddings=True, mtp_depth=1), Parallel(recompute="selective"), precision="bf16"),
    "lion, full": Case(MODEL, Parallel(recompute="full"), Optim(name="lion", lr=1e-3), precision="bf16", shadows=True),
    "muon, 8-bit moments": Case(MODEL, Parallel(), Optim(name="muon", lr=1e-3, moments="int8"), precision="bf16"),
    "offloaded": Case(MODEL, Parallel(offload=("optimizer",)), precision="bf16"),
    "layered": Case(MODEL, Parallel(accumulation="layered", update_in_backward=True), precision="bf16", clip=0.0, keep_tensors=False),
    "experts": Case(tiny(moe=Moe(num_experts=4, top_k=2, num_shared=1, ffn_size=16)), precision="bf16"),
    "fp8": Case(tiny(hidden_size=32, vocab_size=48), precision="bf16", fp8="static", seq_len=16),
}
MORE = {
    "matformer": Case(tiny(matformer={"sizes": [16, 32], "train": "sum"}), precision="bf16"),
    "bitlinear": Case(tiny(linear="bitlinear"), precision="bf16"),
    "compiled": Case(MODEL, Parallel(compile=True), precision="bf16"),
}
RANKS = {
    "ddp": Case(MODEL, Parallel(engine="ddp", dp_replicate=2, dp_shard=1), precision="bf16"),
    "zbv, tied": Case(TIED, Parallel(pp=2, pp_schedule="zbv", dp_shard=1), precision="bf16", batch=8),
    "1f1b, tied": Case(TIED, Parallel(pp=2, pp_schedule="1f1b", dp_shard=1), precision="bf16"),
}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["loss"] == b["loss"] and a["norm"] == b["norm"]
    for kind in ("grad", "weight"):
        assert all(torch.equal(x, b[kind][name]) for name, x in a.get(kind, {}).items())


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_the_same_numbers(name: str) -> None:
    """Catches a shadow that is not written after its weight has changed, by any optimizer, and a gradient that is rounded otherwise."""
    case = (CASES | MORE)[name]
    assert_same(train(replace(case, shadows=True)), train(replace(case, shadows=False)))


def both_ways(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    return train(replace(case, shadows=True)), train(replace(case, shadows=False))


@pytest.mark.dist
def test_the_same_numbers_on_ranks() -> None:
    """Catches a tied table whose copy on the last stage is stale, deferred products that take the master, and shadows under DDP."""
    for case in RANKS.values():
        assert_same(*run_ranks(2, both_ways, case)[0])


class Casts(TorchDispatchMode):
    """Casts of matrices from fp32 to bf16, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32 and kwargs.get("dtype") == torch.bfloat16:
            self.found.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def casts(case: Case) -> list[tuple[int, ...]]:
    """Matrices that a step of two micro-batches casts."""
    model = build(case, 1)
    engine, shapes = build_engine(model, case.config, CPU), {tuple(w.local.shape) for w in model.weights if w.local.ndim == 2}
    for w in model.weights:
        w.local.add_(0.0)
    with Casts() as mode:
        update(engine, backward(engine, [fake_batch(case, [i]) for i in range(2)], 1.0, 1e-3))
    return [s for s in mode.found if s in shapes]


def test_nothing_is_cast_again() -> None:
    """Catches a product, a table or a head that still casts its master, in forward or in recomputation."""
    case = Case(MODEL, Parallel(recompute="full"), precision="bf16", shadows=True)
    assert not casts(case) and len(casts(replace(case, shadows=False))) > 2 * 14


def test_where_memory_comes_first() -> None:
    """Catches a default that takes 2 bytes a weight from those who recompute whole blocks, and shadows of weights that are not cast."""
    kept = {
        mode: Case(MODEL, Parallel(recompute=mode), precision="bf16").config.shadows for mode in ("none", "selective", "full", "nested")
    }
    assert kept == {"none": True, "selective": True, "full": False, "nested": False}
    assert not Case(MODEL, precision="fp32").config.shadows
    names = {name for name, m in build(CASES["adamw"], 1).model.named_modules() if getattr(m, "shadow", None) is not None}
    products = {f"blocks.{i}.{p}" for i in range(2) for p in ("attention.q", "attention.k", "attention.v", "attention.o")}
    assert names == {"embedding", "head"} | products | {f"blocks.{i}.ffn.{p}" for i in range(2) for p in ("up", "gate", "down")}
