"""Unit scaling: variances at the start, optimizer rules, layouts with FP8 products, and what checkpoints hold."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.analysis.compiled_graphs import Coverage, counted_graphs
from megascale.config.schema import Model, Optim, Parallel
from megascale.model.experts import Bank
from megascale.model.layers import Linear
from megascale.optim.rates import Rate, grouped_by_rate, rate_of
from megascale.parallel.precision import watched_casts
from megascale.precision.loss_scale import loss_scale
from megascale.precision.watch import shares
from tests.layouts import Case, build, fake_batch, tiny, train, worst
from tests.ranks import run_ranks
from tests.runs import losses, make_tokens, run, settings
from tests.test_layouts import assert_equal, single

FREE = Optim(lr=1e-3, weight_decay=0.0)


def unit(**changes: Any) -> Model:
    """A unit-scaled model whose parts on two tensor ranks have sizes that FP8 products take."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 96, "ffn": "gelu", "vocab_size": 50}
    return tiny(residual="mus", **{**sizes, **changes})


def test_every_product_keeps_unit_variance() -> None:
    """Catches a fan-in of the cut or of the output dimension, and a scale that backward lacks: forward and input gradient of standard
    normal inputs have the variance that shapes promise (rows summed over `in`, gradients over `out`), within 6 % for 4096 and more numbers.
    """
    torch.manual_seed(0)
    model = build(Case(unit(num_layers=1, hidden_size=128, ffn_size=256, num_kv_heads=4), precision="fp32"), 1).model
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    assert len(linears) == 6
    for name, module in linears.items():
        rows, columns = module.weight.shape
        x = torch.randn(256, columns, requires_grad=True)
        y = module(x)
        g = torch.randn_like(y)
        y.backward(g)
        assert x.grad is not None and module.weight.grad is not None
        assert y.var().item() == pytest.approx(1.0, rel=0.06), name
        assert x.grad.var().item() == pytest.approx(rows / columns, rel=0.06), name
        assert module.weight.grad.var().item() == pytest.approx(256 / columns, rel=0.06), name


def test_the_stream_keeps_unit_variance() -> None:
    """Catches √(1−τ) and τ mixed up, and a norm that stands before the branch: variance of the stream at every block is 1 within 10 %
    (tokens that repeat make it a mean over few)."""
    seen: list[float] = []
    case = Case(unit(num_layers=8, hidden_size=128, ffn_size=256), precision="fp32", seq_len=64)
    model = build(case, 1).model
    for _, block in model.units():
        block.register_forward_hook(lambda m, i, o: seen.append(o.var().item()))
    batch = fake_batch(replace(case, model=case.model), list(range(8)))
    logits = model(batch.tokens)
    assert seen == pytest.approx([1.0] * 8, rel=0.1)
    # 1/d instead of 1/√d: logits start small, at 1/√d.
    assert logits.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.1)


@pytest.mark.parametrize(("layers", "tau"), [(4, 0.4), (16, 0.2), (100, 0.1), (1000, 0.1)])
def test_tau_falls_with_depth(layers: int, tau: float) -> None:
    """Catches another rule than min(0.4, max(0.1, 0.8/√L))."""
    from megascale.model.residual import Stack, residual

    row = residual(unit(num_layers=layers), Stack("decoder", layers), 0)
    assert (row.skip, row.branch) == pytest.approx((math.sqrt(1 - tau), math.sqrt(tau)))
    row = residual(unit(num_layers=layers, mus_tau=0.3), Stack("decoder", layers), 0)
    assert row.branch == pytest.approx(math.sqrt(0.3))


def test_rates_by_role_and_width() -> None:
    """Catches a rate of embedding, norms or head that follows the width, and a decay that does."""
    cfg = Optim(lr=0.01, weight_decay=1e-4, base_width=64, independent_decay=True)
    model = build(Case(unit(hidden_size=256, moe={"num_experts": 4, "ffn_size": 64}), precision="fp32"), 1)
    for w in model.weights:
        spec = w.placement.spec
        rate = rate_of(spec, cfg, unit(hidden_size=256))
        hidden = spec.role not in ("embedding", "head", "norm")
        assert rate.factor == (0.5 if hidden else 1.0), w.name
        if spec.role != "norm":
            # What a step takes off: own rate × decay = weight_decay at the peak, for every role.
            assert cfg.lr * rate.factor * rate.decay == pytest.approx(1e-4), w.name
    matrix = next(w.placement.spec for w in model.weights if w.placement.spec.role == "query")
    assert rate_of(matrix, Optim(lr=0.01), unit(hidden_size=256)) == Rate(1.0, 0.1)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_independent_decay_and_transfer(name: str) -> None:
    """Catches optimizers that decay by their own rate, or step at the schedule's: with zero gradients a step takes off
    weight_decay·lr/peak; with gradients of one sign AdamW's and Lion's first step is the rate itself.
    """
    from megascale.optim.optimizers import build_optimizer

    cfg = Optim(name=name, lr=0.01, weight_decay=0.01, base_width=16, independent_decay=True)  # type: ignore[arg-type]
    for gradient in (0.0, 1.0):
        model = build(Case(unit(), precision="fp64"), 1)
        optimizer = build_optimizer(model, cfg)
        before = {w.name: w.local.clone() for w in model.weights}
        for w in model.weights:
            w.parameter.grad = torch.full_like(w.parameter, gradient)
        optimizer.step(0.005, torch.ones((), dtype=torch.float64), torch.tensor(True))
        for w in model.weights:
            own = 0.005 * (0.5 if w.placement.spec.role in ("query", "key", "value", "attention_out", "up", "down") else 1.0)
            kept = 1 - 0.01 * 0.5 if w.placement.spec.decays else 1.0
            expected = before[w.name] * kept - (own if gradient else 0.0)
            torch.testing.assert_close(w.local, expected, atol=1e-9, rtol=1e-6)


def test_groups_hold_every_weight_once() -> None:
    """Catches weights that share a rate and end in two groups, or in none."""
    cfg = Optim(base_width=16, weight_decay=1e-4, independent_decay=True)
    model = build(Case(unit()), 1)
    rates = {w.name: rate_of(w.placement.spec, cfg, unit(hidden_size=64)) for w in model.weights}
    groups = grouped_by_rate({w.name: w.name for w in model.weights}, rates, cfg.eps)
    assert sorted(n for g in groups for n in g["params"]) == sorted(rates)
    assert len(groups) == len(set(rates.values())) == 3


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, Parallel(dp_shard=2)),
        (3, Parallel(dp_shard=3)),
        (4, Parallel(dp_replicate=2, dp_shard=2, recompute="selective")),
        (2, Parallel(engine="ddp")),
        (2, Parallel(dp_shard=2, accumulation="layered", recompute="full")),
        (2, Parallel(pp=2)),
        (2, Parallel(pp=2, pp_schedule="zbv")),
    ],
)
def test_fp8_where_no_sum_changes(ranks: int, parallel: Parallel) -> None:
    """Catches weights that are gathered in other bits than they are cast to, and gradients of another precision: these layouts add up
    tokens in another order at most, after the last rounding to FP8. First losses are equal to fp32's last bit, gradients to 1e-6.
    """
    case = Case(unit(num_layers=4), parallel, FREE, "fp32", fp8="static", loss_scale=2.0**16, batch=6, seq_len=16)
    reference, got = single(case), run_ranks(ranks, train, case)[0]
    assert got["loss"][0] == pytest.approx(reference["loss"][0], rel=1e-7)
    assert worst(got["grad"], reference["grad"])[0] <= 1e-6
    # From the second step on a last bit may turn a cast, by 6 % of one number among thousands.
    assert max(abs(a - b) / abs(b) for a, b in zip(got["loss"], reference["loss"])) <= 1e-4


@pytest.mark.slow
@pytest.mark.dist
def test_compiled_and_sharded() -> None:
    """Catches a compiled block that FSDP2's weight of one byte does not enter, and a watched step that breaks it."""
    case = Case(unit(), Parallel(dp_shard=2, compile=True), FREE, "fp32", fp8="static", loss_scale=2.0**16, seq_len=16)
    reference, got = single(case), run_ranks(2, train, case, timeout=200)[0]
    assert max(abs(a - b) / abs(b) for a, b in zip(got["loss"], reference["loss"])) <= 1e-4


EXPERTS = {"num_experts": 4, "ffn_size": 64, "num_shared": 1, "shared_gate": True, "expert_bias": True, "router_bias": True}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "parallel", "model"),
    [
        (2, Parallel(tp=2), {}),
        (4, Parallel(tp=2, tp_sequence=True, dp_shard=2), {}),
        (2, Parallel(cp=2), {}),
        (2, Parallel(tp=2), {"family": "encoder"}),
        (2, Parallel(dp_shard=2, ep=2), {"moe": EXPERTS}),
        (4, Parallel(tp=2, dp_shard=2, ep=2), {"moe": EXPERTS}),
        (2, Parallel(pp=2, pp_schedule="zbv"), {"moe": EXPERTS}),
    ],
)
def test_fp8_within_a_band(ranks: int, parallel: Parallel, model: dict[str, Any]) -> None:
    """Catches an axis that loses the scale or a cast. Where a sum over ranks is rounded before the next cast, single casts differ by up to
    one step of FP8 (6 %), so whole gradients are compared by their direction and losses within 1 %.
    """
    case = Case(unit(num_layers=4, **model), parallel, FREE, "fp32", fp8="static", loss_scale=2.0**16, seq_len=16)
    reference, got = single(case), run_ranks(ranks, train, case)[0]
    assert max(abs(a - b) / abs(b) for a, b in zip(got["loss"], reference["loss"])) <= 1e-2
    for name, wanted in reference["grad"].items():
        cosine = torch.nn.functional.cosine_similarity(got["grad"][name].flatten(), wanted.flatten(), 0)
        assert cosine.item() > 0.99, name


@pytest.mark.dist
@pytest.mark.parametrize("changes", [{}, {"moe": EXPERTS}])
def test_the_reference_path_equals_one_process(changes: dict[str, Any]) -> None:
    """Catches unit scaling that depends on a rank's part of a matrix: the same model in fp64 without FP8."""
    parallel = Parallel(tp=2, tp_sequence=True, dp_shard=2, recompute="full", ep=2 if changes else 1)
    assert_equal(Case(unit(num_layers=4, **changes), parallel, FREE), 4)
    assert_equal(Case(unit(num_layers=4, **changes), Parallel(pp=2, pp_schedule="zbv"), FREE), 2)


@pytest.mark.dist
def test_gathers_send_one_byte_a_weight() -> None:
    """Catches weights that travel in bf16: of a block's matrices an all-gather sends one byte an element, of everything else two."""
    case = Case(unit(num_layers=2), Parallel(dp_shard=2), FREE, "bf16", batch=2, steps=1, keep_tensors=False)
    sent = {fp8: run_ranks(2, train, replace(case, fp8=fp8))[0]["sent"]["dp_shard"] for fp8 in ("false", "static")}
    weights = build(replace(case, parallel=Parallel()), 1).weights
    matrices = sum(w.placement.spec.numel for w in weights if w.name.startswith("blocks") and w.placement.spec.role != "norm")
    assert sent["false"] - sent["static"] == 2 * matrices // 2  # forward and backward, half of it from each rank


def test_loss_scale_from_shapes() -> None:
    """Catches a scale that is no power of two, or follows the layout instead of the shapes."""
    from megascale.config.load import build_config

    values: dict[str, Any] = {
        "model": {"num_layers": 1, "hidden_size": 96, "num_heads": 4, "residual": "mus"},
        "train": {"steps": 1, "seq_len": 100, "global_batch_size": 8},
        "data": {"train": "x"},
        "precision": {"fp8": True},
    }
    scale = loss_scale(build_config(values))
    assert scale == 64 * 2**17 and 2**16 < 96 * 800 <= 2**17
    assert loss_scale(build_config({**values, "precision": {"fp8": True, "loss_scale": 8}})) == 8
    assert loss_scale(build_config({**values, "precision": {}})) == 1


def vanished(scale: float) -> float:
    """Share of the gradients at the last block's FFN-down that are zero after the cast, in a step of 2048 tokens at width 128."""
    case = Case(unit(hidden_size=128, ffn_size=256), precision="fp32", fp8="static", seq_len=128)
    model = build(case, 1)
    batch = fake_batch(case, list(range(16)))
    with watched_casts(model.stages, True):
        model.module(batch.tokens, batch.targets, scale=scale / batch.valid).backward()
    down = model.model.get_submodule("blocks.1.ffn.down")
    assert isinstance(down, Linear) and down.metrics is not None
    found = shares(down.metrics.flush())
    assert found["weight_vanished"] < 0.01 and found["input_vanished"] < 0.4 and found["gradient_clamped"] == 0
    return found["gradient_vanished"]


def test_without_the_loss_scale_gradients_vanish() -> None:
    """Catches a scale that does not reach backward, and a watch that sees nothing: a mean loss leaves e5m2 little, the scale from shapes
    nearly all.
    """
    assert vanished(1.0) > 0.9 and vanished(64 * 2.0**18) < 0.001


def lost(case: Case, compiled: bool) -> tuple[list[dict[str, float]], Coverage]:
    """What each product's casts lost in a watched step between two others, and how the step was compiled."""
    with counted_graphs() as found:
        model = build(case, 1)
        for _, block in model.model.units() if compiled else ():
            block.forward = torch.compile(block.forward, backend="aot_eager", dynamic=False)  # type: ignore[method-assign]
        batch, metrics = fake_batch(case, [0, 1]), [m.metrics for m in model.model.modules() if isinstance(m, Linear | Bank) and m.metrics]
        for on in (False, True, False):
            with watched_casts(model.stages, on):
                model.module(batch.tokens, batch.targets, scale=1.0).backward()
            assert on or not any(m.totals for m in metrics)
            if on:
                seen = [shares(m.flush()) for m in metrics]
    return seen, found


def test_a_watched_step_is_compiled() -> None:
    """Catches a watch that runs its step eager, whose memory no other step needs, and one that a graph keeps or forgets."""
    case = Case(
        unit(moe={"num_experts": 4, "top_k": 2, "ffn_size": 16}, hidden_size=32, ffn_size=32), precision="fp32", fp8="static", seq_len=16
    )
    (plain, _), (compiled, found) = lost(case, False), lost(case, True)
    assert len(plain) == 2 * 6 and all(p == pytest.approx(c, abs=1e-3) for p, c in zip(plain, compiled))
    assert any(p["gradient_vanished"] > 0 for p in plain)
    assert (found.graphs, found.breaks) == (2, 0), found.reasons


@pytest.mark.dist
def test_fp8_and_bf16_resume_each_other(tmp_path: Path) -> None:
    """Catches scales in a checkpoint, and a precision that counts as another run."""
    make_tokens(tmp_path / "tokens")
    model = {"model__residual": "mus", "model__hidden_size": 64, "model__num_heads": 4, "model__ffn_size": 64, "optim__weight_decay": 0.0}
    values = settings(tmp_path, **model, precision__compute="fp32", precision__fp8="static")
    assert {c for c, _ in run_ranks(2, run, values, 3)} == {75}
    from megascale.checkpoint.index import read_index

    names = set(read_index(tmp_path / "run" / "checkpoints" / "step-00000003").tensors)
    assert not {n for n in names if "scale" in n or "amax" in n}
    other = {**values, "precision": {"compute": "fp32"}, "parallel": {}}
    assert run_ranks(1, run, other) == [(0, "done")]
    assert len(losses(tmp_path)) == 6 and all(map(math.isfinite, losses(tmp_path)))
