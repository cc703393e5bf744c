"""Layered accumulation: the same gradients, and one gather a layer and direction however many micro-batches there are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megascale.config.schema import Optim, Parallel
from megascale.data.loader import Batch
from megascale.schedule import layered
from megascale.schedule.orders import Action, layered_forward_order, layered_order
from megascale.train.build import build_schedule
from megascale.train.engines.in_backward import InBackward
from tests.layouts import CPU, Case, build, fake_batch, tiny, train
from tests.planned import assert_planned
from tests.ranks import run_ranks
from tests.runs import make_tokens, rows, run, settings
from tests.test_counts import ITEM, padded
from tests.test_layouts import MODELS, assert_equal

pytestmark = pytest.mark.dist
LAYOUTS: dict[str, tuple[int, Parallel]] = {
    "one process": (1, Parallel()),
    "zero": (2, Parallel(dp_shard=2)),
    "replicas": (2, Parallel(dp_replicate=2, dp_shard=1)),
    "hsdp": (4, Parallel(dp_replicate=2, dp_shard=2)),
    "tp x zero x recompute": (4, Parallel(tp=2, tp_sequence=True, dp_shard=2, recompute="full")),
    "cp x zero": (4, Parallel(cp=2, dp_shard=2)),
    "tp x selective": (2, Parallel(tp=2, recompute="selective")),
}


def case_of(layout: str, model: str = "llama", **changes: Any) -> tuple[int, Case]:
    ranks, parallel = LAYOUTS[layout]
    parallel = parallel.model_copy(update={"accumulation": "layered", "breadth_first": changes.pop("breadth_first", None)})
    return ranks, Case(MODELS[model], parallel, batch=2 * ranks, **changes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layered_equals_one_process(layout: str) -> None:
    """Catches a micro-batch whose gradient is reduced twice or lost, and a layer that meets another micro-batch's stream."""
    ranks, case = case_of(layout, packed=True)
    assert_equal(case, ranks)


@pytest.mark.parametrize("model", [m for m in MODELS if m != "llama"])
def test_every_model(model: str) -> None:
    """Catches a tied head whose gradient does not reach the embedding, dropout keyed by stage, positions lost between stages."""
    ranks, case = case_of("tp x zero x recompute", model)
    assert_equal(case, ranks)


@pytest.mark.parametrize("layout", ["one process", "zero", "hsdp"])
def test_groups_of_micro_batches(layout: str) -> None:
    """Catches reductions of one group that overwrite another's, and replicas summed once per group instead of once per step."""
    ranks, case = case_of(layout, breadth_first=2)
    assert_equal(replace(case, batch=4 * ranks), ranks)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mixed_precision_under_sharding(precision: str) -> None:
    """Catches gradients of many micro-batches summed in bf16: the sum is as close to fp64's as depth-first's."""
    ranks, case = case_of("zero", precision=precision)
    case = replace(case, batch=16, steps=1)
    exact = run_ranks(1, train, replace(case, precision="fp64", parallel=Parallel()))[0]["grad"]
    gaps = []
    for parallel in (case.parallel, Parallel(dp_shard=2)):
        got = run_ranks(ranks, train, replace(case, parallel=parallel))[0]["grad"]
        gaps.append(max((got[n] - g).norm().item() / g.norm().item() for n, g in exact.items()))
    assert gaps[0] <= 1.1 * gaps[1] + 1e-6


def sharded_bytes(m: int, tied: bool, breadth: int | None = None) -> tuple[dict[str, Any], dict[str, int]]:
    """What a step on two ranks sends, and the bytes of embedding, one block and head."""
    cfg = tiny(num_layers=3, tie_embeddings=tied)
    case = Case(cfg, Parallel(dp_shard=2, accumulation="layered", breadth_first=breadth), batch=2 * m, steps=2, keep_tensors=False)
    vocabulary = padded((cfg.vocab_size or 0, cfg.hidden_size), 2) * ITEM
    d, kv = cfg.hidden_size, (cfg.num_kv_heads or 0) * (cfg.head_dim or 0)
    block = (2 * d * d + 2 * kv * d + 3 * d * (cfg.ffn_size or 0) + 2 * d) * ITEM
    results = run_ranks(2, train, case)
    assert_planned(case, results)
    return results[0], {"embedding": vocabulary, "block": block, "head": vocabulary + padded((d,), 2) * ITEM}


@pytest.mark.parametrize("m", [1, 2, 3, 8, 16])
def test_weights_cross_once_a_step(m: int) -> None:
    """Catches a gather or a reduction of every micro-batch: 2L − 1 gathers and L reductions of blocks, whatever m is."""
    result, size = sharded_bytes(m, tied=m == 3)
    layers = 3
    assert result["calls"]["dp_shard", "all_gather"] == (2 * layers - 1) + 1 + 1
    assert result["calls"]["dp_shard", "reduce_scatter"] == layers + 1 + 1
    gathered = (2 * layers - 1) * size["block"] + size["embedding"] + size["head"]
    reduced = layers * size["block"] + size["embedding"] + size["head"]
    assert result["sent"]["dp_shard"] == (gathered + reduced) // 2


def test_groups_cost_what_they_should() -> None:
    """Catches breadth_first without effect: g groups gather and reduce g times, so breadth 1 is ordinary accumulation."""
    for breadth, groups in ((1, 4), (2, 2), (4, 1)):
        result, _ = sharded_bytes(4, tied=False, breadth=breadth)
        assert result["calls"]["dp_shard", "reduce_scatter"] == groups * 5
        assert result["calls"]["dp_shard", "all_gather"] == groups * 7


def test_replicas_are_summed_once_a_layer_and_step() -> None:
    """Catches an all-reduce over the slow link of every group."""
    _, case = case_of("hsdp", breadth_first=1, keep_tensors=False, steps=1)
    result = run_ranks(4, train, replace(case, batch=12))[0]
    assert result["calls"]["dp_replicate", "all_reduce"] == MODELS["llama"].num_layers + 2


@pytest.mark.parametrize("stages", [3, 4, 8])
@pytest.mark.parametrize(("m", "breadth"), [(1, 1), (5, 5), (6, 2), (12, 3), (7, 3)])
def test_the_order_can_run(stages: int, m: int, breadth: int) -> None:
    """Catches a stage used before it is gathered, a micro-batch that skips a layer, and more weights held than two blocks and the head."""
    order = layered_order(stages, m, breadth)
    gathered: set[int] = set()
    forward: set[tuple[int, int]] = set()
    backward: set[tuple[int, int]] = set()
    for step in order:
        key = step.stage, step.micro_batch
        match step.kind:
            case "G":
                gathered.add(step.stage)
                assert len(gathered - {stages - 1}) <= 2
            case "F":
                assert step.stage in gathered
                assert step.stage == 0 or (step.stage - 1, step.micro_batch) in forward
                forward.add(key)
            case "B":
                assert step.stage in gathered or step.stage == 0
                assert key in forward and (step.stage == stages - 1 or (step.stage + 1, step.micro_batch) in backward)
                backward.add(key)
            case "U":
                gathered.discard(step.stage)
    everything = {(s, i) for s in range(stages) for i in range(m)}
    assert forward == backward == everything and not gathered
    counts = Counter(s.kind for s in order)
    groups = -(-m // breadth)
    assert counts["F"] == counts["B"] == stages * m
    # Of blocks 2L − 1 gathers, and one each of embedding and head.
    assert counts["R"] == groups * stages and counts["G"] == groups * (2 * (stages - 2) + 1)
    reduced = [(a.stage, b.kind) for a, b in pairwise(order) if a.kind == "R"]
    assert reduced == [(s, "B") for _ in range(groups) for s in reversed(range(stages))]
    assert not Counter(s.kind for s in layered_forward_order(stages, m))["B"]


def recorded(case: Case) -> list[tuple[str, int, int]]:
    """The computations that really ran, noted after each."""
    seen: list[tuple[str, int, int]] = []
    forward, backward = layered._Pass.forward, layered._Pass.backward

    def note_forward(self: Any, number: int, i: int) -> None:
        forward(self, number, i)
        seen.append(("F", number, i))

    def note_backward(self: Any, number: int, i: int) -> None:
        backward(self, number, i)
        seen.append(("B", number, i))

    layered._Pass.forward, layered._Pass.backward = note_forward, note_backward  # type: ignore[method-assign]
    train(case)
    return seen


def test_what_runs_is_the_order() -> None:
    """Catches an executor that departs from the printed order."""
    case = Case(MODELS["llama"], Parallel(accumulation="layered", breadth_first=2), Optim(lr=1e-3), batch=4, steps=1)
    ran = run_ranks(1, recorded, case)[0]
    wanted = [s for s in layered_order(MODELS["llama"].num_layers + 2, 4, 2) if s.kind in "FB"]
    assert [Action(*s) for s in ran] == wanted


def test_updates_during_backward(tmp_path: Path) -> None:
    """Catches a layer that moves before its gradient is whole, a tied embedding updated without its head's share, and moments lost at a
    resume: the same run with updates after the step, and one that changes between the two ways on another layout.
    """
    make_tokens(tmp_path / "tokens")
    fixed: dict[str, Any] = {"train__clip": 0.0, "model__tie_embeddings": True, "model__qk_norm": True, "train__packing": "documents"}
    layered_keys = {"parallel__accumulation": "layered", "parallel__update_in_backward": True}
    for place, steps in (
        ("after", [(1, {}, None)]),
        ("during", [(2, {**layered_keys, "parallel__dp_shard": 2}, None)]),
        ("both", [(4, {**layered_keys, "parallel__dp_shard": 2, "parallel__tp": 2, "parallel__tp_sequence": True}, 2), (3, {}, None)]),
    ):
        for ranks, keys, stop in steps:
            given = settings(tmp_path, **fixed, **keys)
            given["run"]["dir"] = str(tmp_path / place / "run")
            codes = run_ranks(ranks, run, given, stop)
            assert {code for code, _ in codes} == ({75} if stop else {0}), codes
    for place in ("during", "both"):
        for key in ("loss", "grad_norm"):
            wanted, got = ([r[key] for r in rows(tmp_path / p)] for p in ("after", place))
            assert max(abs(a - b) / b for a, b in zip(got, wanted)) <= 1e-12, (place, key)


def gradients_alive(case: Case) -> int:
    """The most weights that had a gradient at once, while a layer was updated."""
    model = build(case, 1)
    engine = InBackward(model, layered.Layered(model, None), Optim(), CPU)
    most = [0]
    update = engine._update_stage

    def count(number: int) -> None:
        most[0] = max(most[0], len({w.name.split(".")[1] for w in model.weights if w.parameter.grad is not None and "blocks" in w.name}))
        update(number)

    engine.schedule.after_stage = count
    tokens = torch.zeros(1, case.seq_len, dtype=torch.int64)
    engine.run([Batch(tokens, tokens, None, None, torch.arange(1), case.seq_len)] * 2, 1.0, 1e-3)
    return most[0]


def test_gradients_of_one_layer_live_at_once() -> None:
    """Catches an update during backward that saves nothing."""
    assert run_ranks(1, gradients_alive, Case(tiny(num_layers=5), Parallel(accumulation="layered")))[0] == 1


def most_kept(accumulation: str) -> float:
    """The most bytes of reductions' inputs that FSDP2 held in two steps, as a share of the whole model's unsharded gradient. One process
    as rank 0 of two, whose messages carry nothing.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from benchmarks.layered.memory import kept_by_reductions

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    parallel = Parallel(dp_shard=2, accumulation=accumulation, recompute="full")
    case = Case(tiny(num_layers=12, hidden_size=64, ffn_size=128), parallel, precision="bf16", seq_len=16)
    model = build(case, 2)
    schedule = build_schedule(model, parallel, CPU)
    with kept_by_reductions() as held:
        for _ in range(2):
            schedule.run([fake_batch(case, [i]) for i in range(2)], 1.0)
    dist.destroy_process_group()
    return max(held) / sum(4 * w.placement.spec.numel for w in model.weights)


@pytest.mark.parametrize("accumulation", ["depth_first", "layered"])
def test_the_unsharded_gradient_is_not_kept(accumulation: str) -> None:
    """Catches stages that each keep what they gave their reduction until the step ends: 4 bytes a parameter on every GPU, 32 GB at 8B."""
    assert run_ranks(1, most_kept, accumulation)[0] <= 0.1
