"""Recomputation under every precision and engine: each combination that the rules allow runs one step, with all that is observed in it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist

from megascale.comm.mesh import build_mesh
from megascale.config.layout import axis_sizes
from megascale.config.load import build_config
from megascale.config.schema import Config, Parallel, Precision
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.parallel.precision import watched_casts
from megascale.train.build import build_engine, build_model
from megascale.train.log.module_metrics import MetricsOverRanks
from tests.layouts import CPU, Case, fake_batch
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist
TORCHAO, DEEPSPEED = (importlib.util.find_spec(package) is not None for package in ("torchao", "deepspeed"))
RANKS = 2
SIZES = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 32, "vocab_size": 40}
# What observes, rounds or keeps state in forward, one model for each product that precisions know.
MODELS: dict[str, dict[str, Any]] = {
    "unit scaled experts": {"residual": "mus", "ffn": "gelu", "moe": {"num_experts": 2, "top_k": 1, "num_shared": 1}},
    "dense": {"dropout": 0.1, "qk_norm": True},
    "bitlinear, dyt": {"linear": "bitlinear", "norm": "dyt"},
}


def choices(section: type[Any], key: str) -> tuple[Any, ...]:
    """What a key may be, as the schema says."""
    kind = section.model_fields[key].annotation
    return tuple(value for part in (kind, *get_args(kind)) for value in get_args(part) if isinstance(value, str)) or get_args(kind)


def combinations() -> Iterator[tuple[str, Config]]:
    """Name → config of every combination that the rules allow on two ranks."""
    axes = [
        MODELS,
        [mode for mode in choices(Parallel, "recompute") if mode != "budget"],  # that of compiled blocks alone
        choices(Parallel, "engine"),
        choices(Parallel, "accumulation"),
        choices(Precision, "compute"),
        ("false", "static", "dynamic"),
        (None, "bf16"),
    ]
    for model, recompute, engine, accumulation, compute, fp8, master in product(*axes):
        if master is not None and model != "dense":
            continue  # weights are cast before a product meets them, alike in every model
        name = f"{model}, {recompute}, {engine}, {accumulation}, {compute}, fp8 {fp8}, masters {master}"
        values = {
            "run": {"device": "cpu", "peak_tflops": 0.01},
            "model": {**SIZES, **MODELS[model]},
            "parallel": {"recompute": recompute, "engine": engine, "accumulation": accumulation, "dp_shard": -1},
            "train": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 1, "seq_len": 16},
            "optim": {"weight_decay": 0.0},
            "precision": {"compute": compute, "fp8": fp8, "master": master},
            "data": {"train": "none"},
        }
        try:
            yield name, check(build_config(values), RANKS)
        except UsageError:
            continue


ALLOWED = dict(combinations())
HERE = [
    name
    for name, c in ALLOWED.items()
    if (c.parallel.engine != "deepspeed" or DEEPSPEED) and (c.precision.fp8 != "dynamic" or TORCHAO)  # the extras
]


def one_step(names: list[str]) -> dict[str, str | float]:
    """name → the gradient norm of one step in which everything is watched, or what went wrong."""
    outcome: dict[str, str | float] = {}
    for name in names:
        config = ALLOWED[name]
        mesh = build_mesh(axis_sizes(config.parallel, RANKS), "cpu")
        model, _, _ = build_model(config, mesh, CPU)
        for _ in model.draw_weights(1):
            pass
        case = Case(config.model, config.parallel, precision=config.precision.compute, seq_len=config.train.seq_len)
        batch = fake_batch(case, [dist.get_rank()])
        try:
            model.train(True)
            engine, observed = build_engine(model, config, CPU), MetricsOverRanks(model)
            with watched_casts(model.stages, True):
                engine.run([batch], 1 / 32, 1e-3)
            norm, finite = engine.update(torch.ones((), dtype=torch.float64))
            observed.row(torch.cat(observed.vectors(observed.flush(), CPU, True)), sampled=True)
            outcome[name] = norm.item() if finite else "not finite"
        except Exception as error:
            outcome[name] = f"{type(error).__name__}: {error}"
    return outcome


def test_the_combinations_are_not_refused_away() -> None:
    """Catches a rule, or a key of the schema that is read wrongly, that leaves nothing to try."""
    assert len(HERE) > 100
    for key, section in (("recompute", "parallel"), ("engine", "parallel"), ("accumulation", "parallel"), ("compute", "precision")):
        kind = {"parallel": Parallel, "precision": Precision}[section]
        assert {getattr(getattr(c, section), key) for c in ALLOWED.values()} == set(choices(kind, key)) - {"budget"}, key
    assert {c.precision.fp8 for c in ALLOWED.values()} == {"false", "static", "dynamic"}


def test_every_combination_runs_a_step_and_recomputes_the_same() -> None:
    """Catches an observation, a cast or a mask that recomputation meets otherwise than the forward pass: a crash under `selective`, which
    counts operations, or other gradients. Without recomputation the same numbers are multiplied; norms differ by the order of sums alone.
    """
    norms = run_ranks(RANKS, one_step, HERE, timeout=300)[0]
    failed = {name: said for name, said in norms.items() if isinstance(said, str)}
    assert not failed, "\n".join(f"{name}: {said}" for name, said in failed.items())
    for name, norm in norms.items():
        parts = name.split(", ")
        parts[-6] = "none"
        assert norm == pytest.approx(norms[", ".join(parts)], rel=1e-5), name
