"""Pipelines: equal to one process under every schedule, each product and exchange done once, and run in the order that was drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

from megascale.config.schema import Model, Parallel
from megascale.config.stages import estimated_costs, split_layers, stage_parts, stages_of_rank
from megascale.handles import handle_of
from megascale.model.auxiliary import ride_on
from megascale.model.block import Block
from megascale.schedule.fsdp_roots import param_groups
from megascale.schedule.orders import Action, compute_order, layered_order, steps, with_weights
from megascale.schedule.pipeline import Pipeline, Stage
from megascale.schedule.timeline import draw, simulate, text_lanes
from tests import runs
from tests.layouts import Case, build, fake_batch, tiny, train, worst
from tests.planned import assert_planned
from tests.ranks import run_ranks
from tests.test_layouts import MODELS, assert_equal, assert_same, single

pytestmark = pytest.mark.dist

SCHEDULES: dict[str, int] = {  # and stages a rank
    "gpipe": 1,
    "1f1b": 1,
    "looped_bfs": 2,
    "interleaved_1f1b": 2,
    "interleaved_zero_bubble": 2,
    "zbv": 2,
    "dualpipev": 2,
}
PRODUCTS: dict[str, tuple[int, str, dict[str, Any]]] = {  # ranks beside the pipeline's two, model, keys
    "alone, tied": (1, "gpt", {}),
    "uneven": (1, "xpos", {"recompute": "selective"}),
    "tp x recompute": (2, "odd", {"tp": 2, "recompute": "full"}),
    "tp sequence, tied": (2, "gpt", {"tp": 2, "tp_sequence": True}),
    "zero": (2, "llama", {"dp_shard": 2, "recompute": "full"}),
    "replicas, tied": (2, "gpt", {"dp_replicate": 2, "dp_shard": 1}),
    "ddp, tied": (2, "gpt", {"dp_replicate": 2, "dp_shard": 1, "engine": "ddp"}),
}


def pipelined(schedule: str, **keys: Any) -> Parallel:
    keys = {"pp": 2, "pp_schedule": schedule, "pp_virtual": SCHEDULES[schedule], **keys}
    return Parallel(**keys)


def deep(name: str, layers: int = 5) -> Model:
    return MODELS[name].model_copy(update={"num_layers": layers})


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_equals_one_process(schedule: str, product: str) -> None:
    """Catches gradients of a micro-batch or a stage lost, doubled or scaled, and a tied embedding that its two stages see differently."""
    ranks, model, keys = PRODUCTS[product]
    if product == "uneven":
        keys = {**keys, "pp_layers": (2, 3) if SCHEDULES[schedule] == 1 else (0, 3, 1, 1)}
    data = ranks // keys.get("tp", 1)
    assert_equal(Case(deep(model), pipelined(schedule, **keys), batch=4 * data, packed=model != "xpos"), 2 * ranks)


@st.composite
def random_pipeline(draw_from: st.DrawFn) -> tuple[int, Case]:
    schedule = draw_from(st.sampled_from(sorted(SCHEDULES)))
    pp = draw_from(st.sampled_from([2, 3, 4]))
    keys: dict[str, Any] = {"pp": pp, "recompute": draw_from(st.sampled_from(["none", "selective", "full"]))}
    if schedule in ("looped_bfs", "interleaved_1f1b", "interleaved_zero_bubble"):
        keys["pp_virtual"] = draw_from(st.integers(1, 3))
    if pp == 2:
        keys.update(draw_from(st.sampled_from([{}, {"tp": 2}, {"tp": 2, "tp_sequence": True}, {"dp_shard": 2}, {"dp_replicate": 2}])))
    keys.setdefault("dp_shard", 1)
    parallel = pipelined(schedule, **keys)
    data = parallel.dp_shard * parallel.dp_replicate
    model = tiny(
        num_layers=pp * parallel.stages_per_rank + draw_from(st.integers(0, 3)),
        tie_embeddings=draw_from(st.booleans()),
        residual=draw_from(st.sampled_from(["pre", "post"])),
        position=draw_from(st.sampled_from(["rope", "alibi", "learned"])),
        num_kv_heads=draw_from(st.sampled_from([1, 4])),
        qk_norm=draw_from(st.booleans()),
        bias=draw_from(st.booleans()),
        dropout=draw_from(st.sampled_from([0.0, 0.1])),
    )
    m = pp * draw_from(st.integers(2, 3)) if schedule != "1f1b" else draw_from(st.integers(1, 5))
    return pp * parallel.tp * data, Case(model, parallel, batch=m * data, packed=draw_from(st.booleans()), steps=2)


@given(random_pipeline())
@settings(max_examples=9, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_random_pipelines(drawn: tuple[int, Case]) -> None:
    """Catches what nobody thought of combining."""
    assert_equal(drawn[1], drawn[0])


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_single_and_mixed_precision(precision: str, bound: float, schedule: str) -> None:
    """Catches weight gradients of a split backward that are summed in bf16, messages in the wrong type, and sums that gloo lacks."""
    case = Case(deep("llama"), pipelined(schedule, dp_shard=2), precision=precision, batch=8)
    reference, got = single(case), run_ranks(4, train, case)[0]
    assert max(abs(a - b) / abs(b) for a, b in zip(got["loss"], reference["loss"])) <= bound
    assert worst(got["grad"], reference["grad"])[0] <= 4 * bound


def counted(case: Case) -> dict[str, Any]:
    """A training with the FLOPs of all its products."""
    with FlopCounterMode(display=False) as flops:
        result = train(case)
    return {**result, "flops": flops.get_total_flops()}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_products_and_exchanges_run_once(recompute: str) -> None:
    """Catches a split backward that runs a node twice or recomputes for its weight pass: numbers stay right, only counts show it."""
    found = {}
    for schedule in ("1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"):
        parallel = pipelined(schedule, tp=2, tp_sequence=True, recompute=recompute)
        results = run_ranks(4, counted, Case(deep("llama", 4), parallel, steps=1, keep_tensors=False))
        calls: dict[str, int] = {}
        for (axis, operation), count in ((k, c) for r in results for k, c in r["calls"].items()):
            if axis == "tp" and operation != "all_reduce":  # finishing partial gradients takes one message per rank, whatever its stages
                calls[operation] = calls.get(operation, 0) + count
        found[schedule] = calls, sum(r["flops"] for r in results), sum(r["sent"]["tp"] for r in results)
    assert len({str(f) for f in found.values()}) == 1, found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bytes_between_stages(schedule: str) -> None:
    """Catches a message sent twice, of the wrong size, or to a stage on the same rank; and gathers or reductions per micro-batch."""
    m, ranks = 4, 2
    case = Case(deep("llama", 4), pipelined(schedule, dp_shard=2), steps=2, batch=2 * m, keep_tensors=False)
    results = run_ranks(4, train, case)
    assert_planned(case, results)
    stages = ranks * SCHEDULES[schedule]
    # The two arms of a V meet on the last rank.
    hops = stages - 2 if schedule in ("zbv", "dualpipev") else stages - 1
    activation = case.seq_len * case.model.hidden_size * 8
    for replica in range(2):
        assert sum(results[rank]["sent"]["pp"] for rank in (replica, replica + 2)) == 2 * m * hops * activation
    for rank, result in ((0, results[0]), (1, results[2])):
        # One group a block, and one for the embedding and one for the head where they are; both are on the first rank of a V.
        ends = {0: 2, 1: 0}[rank] if schedule in ("zbv", "dualpipev") else 1
        for operation in ("all_gather", "reduce_scatter"):
            assert result["calls"]["dp_shard", operation] == 2 + ends


def kept_gradients(case: Case) -> int:
    """Bytes of unsharded gradients that FSDP2 holds between two micro-batches of a step, at most."""
    most, real = 0, Stage.backward_one_chunk

    def spy(self: Stage, chunk: int, *args: Any, **keys: Any) -> None:
        nonlocal most
        real(self, chunk, *args, **keys)
        params = [p for g in param_groups(self.submod) for p in g.fsdp_params]
        found = [g for p in params for g in (p.unsharded_accumulated_grad, p._unsharded_param.grad)]
        buffers = fully_shard.state(self.submod)._comm_ctx.reduce_scatter_states  # type: ignore[attr-defined]
        most = max(most, sum(g.nbytes for g in found if g is not None) + sum(s.reduce_scatter_input.nbytes for s in buffers))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "backward_one_chunk", spy)
        train(case)
    return most


@pytest.mark.parametrize("every", [1, 3])
def test_gradients_are_reduced_every_few_micro_batches(every: int) -> None:
    """Catches a reduction that loses or doubles a sum, replicas that are summed too early or never, and gradients that stay unsharded."""
    layouts = {"shards": {"dp_shard": 2}, "replicas": {"dp_replicate": 2, "dp_shard": 1}}
    for keys in layouts.values():
        case = Case(deep("llama", 4), pipelined("1f1b", pp_reduce_every=every, **keys), batch=8)
        assert_equal(case, 4)
        if every == 1:
            once = replace(case, parallel=case.parallel.model_copy(update={"pp_reduce_every": None}))
            assert max(run_ranks(4, kept_gradients, case)) == 0 < min(run_ranks(4, kept_gradients, once))
    case = Case(deep("llama", 4), pipelined("1f1b", pp_reduce_every=every, dp_shard=2), steps=1, batch=8, keep_tensors=False)
    results = run_ranks(4, train, case)
    assert_planned(case, results)
    assert results[0]["calls"]["dp_shard", "reduce_scatter"] == 3 * -(-4 // every)


def recorded(case: Case) -> list[Action]:
    """The actions of this rank's runtime in the last step."""
    done: list[Action] = []

    def watch(name: str, kind: str) -> None:
        real = getattr(Stage, name)

        def spy(self: Stage, chunk: int, *args: Any, **keys: Any) -> Any:
            done.append(Action("I" if kind == "B" and not keys["full_backward"] else kind, self.stage_index, chunk))
            return real(self, chunk, *args, **keys)

        setattr(Stage, name, spy)

    for name, kind in (("forward_one_chunk", "F"), ("backward_one_chunk", "B"), ("backward_weight_one_chunk", "W")):
        watch(name, kind)
    train(replace(case, steps=1))
    return done


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_runs_is_what_is_drawn(schedule: str) -> None:
    """Catches a runtime that follows another order than the one the dry run shows."""
    parallel, m = pipelined(schedule), 4
    ran = run_ranks(2, recorded, Case(deep("llama", 4), parallel, batch=m, keep_tensors=False))
    order = compute_order(schedule, 2, parallel.pp_virtual, m)
    assert ran == [steps(order[r]) for r in range(2)]
    assert [[s.step for s in lane] for lane in simulate(order).lanes] == ran


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_order_can_hang(schedule: str) -> None:
    """Catches a deadlock, a computation that is missing or done twice, for every P ≤ 6, V ≤ 6, m ≤ 12 that is not refused."""
    virtuals = range(1, 7) if schedule in ("looped_bfs", "interleaved_1f1b", "interleaved_zero_bubble") else (SCHEDULES[schedule],)
    for ranks in range(2, 7):
        for virtual in virtuals:
            for m in range(1, 13):
                if schedule.startswith("interleaved") and m % max(1, m // ranks):
                    continue
                if schedule == "dualpipev" and m < 2 * ranks:
                    continue
                order = compute_order(schedule, ranks, virtual, m)
                found = [(s.stage, s.micro_batch, s.kind) for lane in simulate(order).lanes for s in (span.step for span in lane)]
                whole = {(s, i) for s in range(ranks * len(stages_of_rank(schedule, ranks, virtual, 0))) for i in range(m)}
                assert len(set(found)) == len(found)
                assert {(s, i) for s, i, k in found if k == "F"} == whole
                assert sorted((s, i) for s, i, k in found if k in "BI") == sorted(whole)
                assert sorted((s, i) for s, i, k in found if k in "BW") == sorted(whole)
                for r in range(ranks):
                    assert {s.stage for s in steps(order[r])} == set(stages_of_rank(schedule, ranks, virtual, r))


def test_an_order_that_hangs_is_seen() -> None:
    """Catches a simulation that lets everything pass."""
    order = compute_order("1f1b", 2, 1, 3)
    order[1] = order[1][1:] + order[1][:1]
    with pytest.raises(ValueError, match="every rank waits"):
        simulate(order)


def test_timelines_have_the_published_bubbles() -> None:
    """(P−1)/(m+P−1) for GPipe and 1F1B, V times less idle for interleaved (arXiv 2104.04473); 1F1B keeps P activations, GPipe all."""
    for ranks, m in ((2, 8), (4, 8), (4, 16)):
        gpipe, one = (simulate(compute_order(s, ranks, 1, m)) for s in ("gpipe", "1f1b"))
        assert gpipe.bubble == pytest.approx((ranks - 1) / (m + ranks - 1)) and one.bubble == pytest.approx(gpipe.bubble)
        assert max(gpipe.live) == m and max(one.live) == ranks
        interleaved = simulate(compute_order("interleaved_1f1b", ranks, 2, m))
        assert interleaved.bubble == pytest.approx((ranks - 1) / (2 * m + ranks - 1))
        assert simulate(compute_order("zbv", ranks, 2, m)).bubble < interleaved.bubble
    assert text_lanes(simulate(compute_order("1f1b", 2, 1, 2))) == ["rank 0  FF..BB.BB", "rank 1  .FBBFBB.."]


def test_modular_pipelines_gather_each_layer_twice() -> None:
    """Catches gathers and reductions of every micro-batch in looped_bfs with a layer a stage: drawn, and counted where they are sent."""
    gathers = {}
    for m in (4, 8):
        drawn = simulate(with_weights(compute_order("looped_bfs", 2, 4, m), m))
        kinds = [Counter(mark.kind for mark in marks) for marks in drawn.marks]
        assert [k["R"] for k in kinds] == [4, 4]
        # A stage is one group of weights; the first stage, on the first rank, has its embedding as another.
        gathers[m] = sum(2 if mark.stage == 0 else 1 for mark in drawn.marks[0] if mark.kind == "G")
        parallel = pipelined("looped_bfs", pp_virtual=4, dp_shard=2, pp_layers=(1,) * 8)
        case = Case(deep("llama", 8), parallel, batch=2 * m, steps=1, keep_tensors=False)
        calls = run_ranks(4, train, case)[0]["calls"]
        assert calls["dp_shard", "reduce_scatter"] == 4 + 1
        assert calls["dp_shard", "all_gather"] == gathers[m]
    assert gathers[4] == gathers[8]


def test_layered_pipelines_equal_one_process() -> None:
    """Catches a stage of one layer under FSDP2 that is freed while a micro-batch still needs it."""
    parallel = pipelined("looped_bfs", pp_virtual=3, dp_shard=2, tp=1, recompute="full", pp_layers=(1,) * 6)
    assert_equal(Case(deep("gpt", 6), parallel, batch=12), 4)


def test_pictures_can_be_drawn(tmp_path: Path) -> None:
    for end in ("png", "svg"):
        draw(simulate(compute_order("zbv", 4, 2, 8)), "zbv", tmp_path / f"order.{end}")
        assert (tmp_path / f"order.{end}").stat().st_size > 5000
    layered = simulate({0: layered_order(4, 3, 3)})
    draw(layered, "layered", tmp_path / "layered.png")
    assert [(m.kind, m.stage, m.time) for m in layered.marks[0] if m.kind == "R"] == [
        ("R", 3, 18.0),
        ("R", 2, 24.0),
        ("R", 1, 30.0),
        ("R", 0, 36.0),
    ]


def test_layers_are_balanced() -> None:
    """Catches a head that makes the last stage the slowest, and layers lost between stages."""
    assert split_layers(8, 4, 1.0, 0.0, 0.0) == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    heavy = split_layers(10, 4, 1.0, 0.0, 2.0)
    assert [len(r) for r in heavy] == [3, 3, 3, 1] and heavy[-1] == range(9, 10)
    assert [len(r) for r in split_layers(4, 4, 1.0, 0.0, 50.0)] == [2, 1, 1, 0]


@pytest.mark.parametrize(("schedule", "pp", "virtual"), [("1f1b", 2, 1), ("1f1b", 7, 1), ("interleaved_1f1b", 4, 5), ("zbv", 8, 2)])
@pytest.mark.parametrize(("vocabulary", "head"), [(512, 0.67), (32_000, 41.7)])
def test_a_thousand_layers_are_balanced(schedule: Any, pp: int, virtual: int, vocabulary: int, head: float) -> None:
    """Catches stages that are equal in layers although the head costs as much as forty, and a rank a layer or more above its share."""
    cfg = tiny(num_layers=1000, hidden_size=64, num_heads=2, num_kv_heads=2, head_dim=32, ffn_size=128, vocab_size=vocabulary)
    parallel = Parallel(pp=pp, pp_schedule=schedule, pp_virtual=virtual)
    layer, before, after = estimated_costs(cfg, 128)
    assert after / layer == pytest.approx(head, rel=0.1)
    parts = stage_parts(cfg, parallel, 128)
    assert [i for part in parts for i in part.layers] == list(range(1000))
    loads = [len(part.layers) * layer + part.first * before + part.last * after for part in parts]
    assert max(loads) < sum(loads) / len(loads) + layer


@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="pipelines need torch 2.12")
def test_resume_between_pipelines(tmp_path: Path) -> None:
    """Catches state that belongs to a stage: one run wanders over pp 1, 2, 3, 4 and several schedules and equals the one that stayed."""
    runs.make_tokens(tmp_path / "tokens")
    fixed = {"train__steps": 10, "model__num_layers": 8, "model__tie_embeddings": True, "checkpoint__every": 2}
    fixed["train__eval_every"], fixed["data__valid_fraction"] = 5, 0.2
    run_ranks(1, runs.run, runs.settings(tmp_path, **fixed))
    wandering = tmp_path / "wandering"
    wandering.mkdir()
    journey: list[tuple[int, dict[str, Any]]] = [
        (2, {"parallel__pp": 2, "parallel__pp_schedule": "zbv"}),
        (3, {"parallel__pp": 3}),
        (4, {"parallel__pp": 4, "parallel__pp_schedule": "interleaved_1f1b", "parallel__pp_virtual": 2}),
        (1, {}),
        (4, {"parallel__pp": 2, "parallel__dp_shard": 2, "parallel__pp_schedule": "looped_bfs", "parallel__pp_virtual": 3}),
    ]
    for i, (ranks, changes) in enumerate(journey):
        values = {**runs.settings(wandering, **fixed, **changes)}
        values["data"] = {**values["data"], "train": str(tmp_path / "tokens")}
        codes = run_ranks(ranks, runs.run, values, 2 * i + 1)
        assert {c for c, _ in codes} == ({75} if i + 1 < len(journey) else {0}), codes
    assert max(abs(a - b) / b for a, b in zip(runs.losses(wandering), runs.losses(tmp_path))) <= 1e-12
    valid = [[r["valid_loss"]["tokens"] for r in runs.rows(f) if "valid_loss" in r] for f in (wandering, tmp_path)]
    assert len(valid[0]) == 2 and valid[0] == pytest.approx(valid[1], rel=1e-12)
    stayed, came = runs.weights_at(tmp_path, 10), runs.weights_at(wandering, 10)
    assert {n: t.shape for n, t in stayed.items()} == {n: t.shape for n, t in came.items()}
    assert all((came[n] - t).abs().max() <= 1e-11 * t.abs().max().clamp(min=1e-3) for n, t in stayed.items())


class Teller:
    def __init__(self) -> None:
        self.told: list[float] = []

    def hear(self, about: str, loss: torch.Tensor) -> None:
        self.told.append(loss.item())


def with_auxiliary_losses(case: Case) -> tuple[dict[str, Any], float]:
    """Trains with a loss on the stream behind every block; also that loss's sum over the run, as this rank reported it."""
    teller = Teller()
    real, handle = Block.forward, handle_of(teller)

    def forward(self: Block, x: torch.Tensor, context: Any) -> torch.Tensor:
        y = real(self, x, context)
        loss = y.square().sum()
        return ride_on(y, loss, 0.01 / (case.batch * case.seq_len), handle, [loss.detach()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "forward", forward)
        return train(case), sum(teller.told)


AUXILIARY = {"alone": (1, {}), "zero x recompute": (2, {"dp_shard": 2, "recompute": "full"}), "tp": (2, {"tp": 2})}


@pytest.mark.parametrize("product", AUXILIARY)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_losses_of_middle_stages(schedule: str, product: str) -> None:
    """Catches a loss of a middle stage that gets no gradient, or one a pass too often where backward is split or forward repeated."""
    others, keys = AUXILIARY[product]
    case = Case(deep("llama"), pipelined(schedule, **keys), batch=8)
    one = replace(case, parallel=Parallel())
    (reference, expected), plain = with_auxiliary_losses(one), train(one)
    assert worst(plain["grad"], reference["grad"])[0] > 1e-3, "the loss does not matter"
    results = run_ranks(2 * others, with_auxiliary_losses, case)
    assert_same(results[0][0], reference, case)
    copies = others if "tp" in keys else 1  # ranks of tp see the same stream
    assert abs(sum(told for _, told in results) / copies - expected) <= 1e-10 * expected


def evaluated_between(case: Case) -> bool:
    """Whether a step has the same gradients after an evaluation of fewer micro-batches as before it."""
    model = build(case, 2)
    pipeline = Pipeline(model, case.parallel, torch.device("cpu"))
    batches, before = [fake_batch(case, [n]) for n in range(4)], {}
    for _ in range(2):
        pipeline.run(batches, 1.0)
        grads = {w.name: w.local_grad.clone() for w in model.weights if w.local_grad is not None}
        assert len(grads) == len(model.weights)
        before = before or grads
        for w in model.weights:
            w.forget_gradient()
        pipeline.evaluate(batches[:2])
    return all(torch.equal(grads[name], g) for name, g in before.items())


def test_an_evaluation_takes_no_queue_away() -> None:
    """Catches weight gradients queued where the runtime of another number of micro-batches looks for them: they would be lost."""
    assert run_ranks(2, evaluated_between, Case(deep("llama", 4), pipelined("zbv"))) == [True, True]


@pytest.mark.slow
def test_compiled_pipelines() -> None:
    """Catches a deferred product inside a graph, where its queue would be filled once and never again."""
    case = Case(deep("llama", 4), pipelined("zbv", dp_shard=2, compile=True), precision="fp32", batch=8)
    reference, got = single(case), run_ranks(4, train, case, timeout=170)[0]
    assert max(abs(a - b) / abs(b) for a, b in zip(got["loss"], reference["loss"])) <= 2e-5
    assert worst(got["grad"], reference["grad"])[0] <= 1e-4
    assert torch.isfinite(torch.tensor(got["norm"])).all()
