"""The moment rules against Monte Carlo, and whole stacks against what the probe measures, the same on every layout."""

from __future__ import annotations

import json
import math
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.analysis import moments
from megascale.analysis.first_step import measure, write
from megascale.analysis.moments import Gradient, Signal
from megascale.analysis.probe import MeasuredMoments, probe, warnings
from megascale.analysis.theory import feed_forward, stack_points
from megascale.config.load import build_config
from megascale.config.schema import Parallel
from megascale.data.loader import sample_numbers
from megascale.launch.ranks import RankInfo
from megascale.model.residual import Stack, residual
from megascale.train.build import build_schedule
from tests.depth.test_table import scheme
from tests.layouts import CPU, Case, build, fake_batch
from tests.ranks import run_ranks
from tests.runs import make_tokens, settings

N = 400_000
CLOSE = 0.02  # of N draws; the worst of the rules below deviates by 1 %


def draw(x: Signal, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """N entries of two tokens."""
    shared, *own = (torch.randn(N, generator=generator, dtype=torch.float64) for _ in range(3))
    a, b = (math.sqrt(x.corr) * shared + math.sqrt(1 - x.corr) * o for o in own)
    return a * math.sqrt(x.var) + x.mean, b * math.sqrt(x.var) + x.mean


def moments_of(a: Tensor, b: Tensor) -> Signal:
    mean, var = float((a.mean() + b.mean()) / 2), float((a.var() + b.var()) / 2)
    return Signal(mean, var, float(((a - mean) * (b - mean)).mean()) / var)


def assert_close(got: Signal, want: Signal) -> None:
    scale = math.sqrt(want.var)
    assert got.var == pytest.approx(want.var, rel=CLOSE)
    assert got.mean == pytest.approx(want.mean, abs=CLOSE * scale) and got.corr == pytest.approx(want.corr, abs=CLOSE)


@pytest.mark.parametrize("x", [Signal(0.0, 1.0, 0.2), Signal(0.0, 2.5, 0.9), Signal(0.0, 0.3, 0.0)])
@pytest.mark.parametrize("name", ["relu", "gelu", "tanh", "swiglu"])
def test_activations(name: str, x: Signal) -> None:
    """Catches a wrong closed form: mean, variance, correlation and gradient of each activation against draws."""
    generator = torch.Generator().manual_seed(0)
    a, b = (t.requires_grad_() for t in draw(x, generator))
    up_a, up_b = (t.requires_grad_() for t in draw(Signal(0.0, 1.7, 0.5), generator))
    functions = {"relu": F.relu, "gelu": F.gelu, "tanh": lambda t: torch.tanh(0.8 * t)}
    if name == "swiglu":
        u, v = F.silu(a) * up_a, F.silu(b) * up_b
        want = moments.swiglu(x, Signal(0.0, 1.7, 0.5))
    else:
        u, v = functions[name](a), functions[name](b)
        want = {"relu": moments.relu, "gelu": moments.gelu, "tanh": lambda s: moments.tanh(s, 0.8)}[name](x)
    assert_close(moments_of(u.detach(), v.detach()), want)
    g = torch.randn(2, N, generator=generator, dtype=torch.float64) * math.sqrt(3.0)
    g[1] = g[0]  # two tokens with the same gradient: what φ' leaves of it
    torch.autograd.backward((u, v), (g[0], g[1]))
    assert a.grad is not None and b.grad is not None
    if name == "swiglu":
        to_gate, to_up = moments.swiglu_gradients(3.0, x, Signal(0.0, 1.7, 0.5))
        assert up_a.grad is not None and up_a.grad.square().mean().item() == pytest.approx(to_up, rel=2 * CLOSE)
    else:
        rules = {
            "relu": lambda: moments.relu_gradient(3.0),
            "gelu": lambda: moments.gelu_gradient(3.0, x.var),
            "tanh": lambda: moments.tanh_gradient(3.0, x.var, 0.8),
        }
        to_gate = rules[name]()
        if name != "tanh":
            kept = (a.grad * b.grad).mean() / a.grad.square().mean()
            assert kept.item() == pytest.approx(moments.slope_correlation(name, x), abs=CLOSE)
    assert a.grad.square().mean().item() == pytest.approx(to_gate, rel=2 * CLOSE)


@pytest.mark.parametrize("ffn", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("unit", ["variance", "gradient"])
def test_deepscale_units(unit: str, ffn: str) -> None:
    """Catches a gain with the wrong moment: a feed-forward keeps what `deepscale_unit` says, and SwiGLU's gradient comes back twice."""
    cfg = scheme("deepscale", ffn=ffn, ffn_size=160, deepscale_unit=unit)
    row = residual(cfg, Stack("decoder", cfg.num_layers), 0)
    out, pull = feed_forward(cfg, row, Signal(0.0, 1.0, 0.3), 8, True)
    found = {"variance": out.var, "gradient": pull(Gradient(1.0, 0.1)).var}
    between = {"relu": 1.0, "gelu": 1.07, "swiglu": 2.07}[ffn]
    other = {"variance": ("gradient", between), "gradient": ("variance", 1 / between)}[unit]
    assert found == pytest.approx({unit: 1.0, other[0]: other[1]}, rel=0.01)


def test_products_dropout_and_norms() -> None:
    """Catches in and out swapped, a mean that is forgotten, and dropout that decorrelates nothing or scales nothing."""
    generator = torch.Generator().manual_seed(1)
    x, w2, d_in, d_out = Signal(0.7, 1.3, 0.4), 0.02, 300, 500
    tokens = torch.stack([t[: 200 * d_in].view(200, d_in) for t in draw(x, generator)]).requires_grad_()
    w = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64) * math.sqrt(w2)
    y = tokens @ w.t()
    assert_close(moments_of(*y.detach().flatten(1)), moments.linear(x, d_in, w2))
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64) * math.sqrt(0.5)
    y.backward(g)
    assert tokens.grad is not None
    assert tokens.grad.square().mean().item() == pytest.approx(moments.linear_gradient(0.5, d_out, w2), rel=CLOSE)
    a, b = draw(x, generator)
    kept = [t * (torch.rand(N, generator=generator) >= 0.3) / 0.7 for t in (a, b)]
    assert_close(moments_of(*kept), moments.dropout(x, 0.3))
    assert (((torch.rand(N, generator=generator) >= 0.3) / 0.7) ** 2).mean().item() == pytest.approx(
        moments.dropout_gradient(1.0, 0.3), rel=CLOSE
    )
    z = (3.0 * torch.randn(400, 1000, generator=generator, dtype=torch.float64)).requires_grad_()
    normed = F.layer_norm(z, (1000,))
    normed.backward(torch.randn(z.shape, generator=generator, dtype=torch.float64))
    assert normed.var().item() == pytest.approx(moments.norm(Signal(0.0, 9.0, 0.0)).var, rel=CLOSE)
    assert z.grad is not None and z.grad.square().mean().item() == pytest.approx(moments.norm_gradient(1.0, 9.0), rel=CLOSE)


def measured(case: Case) -> list[tuple[Any, ...]]:
    import torch.distributed as dist

    model = build(case, dist.get_world_size() if dist.is_initialized() else 1)
    rows = sample_numbers(0, case.batch, case.micro_batch, model.mesh.data_rank, model.mesh.data_size)
    batches = [fake_batch(case, row) for row in rows]
    points = probe(
        model, build_schedule(model, case.parallel, CPU), batches, case.batch * case.seq_len, 1e-3, case.parallel.tp_sequence, True
    )
    return [astuple(p) for p in points]


STACKS: dict[str, dict[str, Any]] = {
    "pre": {},
    "post": {"ffn": "relu"},
    "res_post": {"ffn": "gelu_tanh"},
    "deepnorm": {},
    "branchnorm": {"ffn": "gelu"},
    "deepscale": {"ffn": "relu", "dropout": 0.1},
    "deepscale_post": {"ffn": "gelu"},
    "subln": {"num_kv_heads": 2},
    "layerscale": {"norm": "layernorm"},
    "parallel": {"dropout": 0.1},
    "neox": {"norm": "layernorm"},
    "pre with dyt": {"norm": "dyt"},
    "pre with bitlinear": {"linear": "bitlinear"},
    "pre with gates": {"attention_gate": "channel", "attention_sink": "learned", "attention_softcap": 1.0},
}


@pytest.mark.parametrize("name", STACKS)
def test_theory_is_what_is_measured(name: str) -> None:
    """Catches a row that theory and blocks read differently. Variances and gradients within 25 %, cosines within 0.2, on
    8 blocks of width 96: theory takes all positions alike, while causal attention averages little for early tokens; and it knows neither
    finite width nor the correlation between a branch and its stream. Most schemes stay within a tenth (docs/depth.md). res_post's norm
    divides each token's branch by its own size, which falls with position as attention averages more: gradients within 50 %, cosines 0.3.
    """
    cosine, gradient = (0.3, 0.5) if name == "res_post" else (0.2, 0.25)
    sizes = {"num_layers": 8, "hidden_size": 96, "num_heads": 4, "num_kv_heads": 4, "ffn_size": 256, "vocab_size": 200, "init_std": 0.08}
    case = Case(scheme(name.split()[0], **{**sizes, **STACKS[name]}), precision="fp32", seq_len=64, batch=8, micro_batch=8)
    points = [MeasuredMoments(*p) for p in measured(case)]
    first, last = points[0], points[-1]
    warm = 0.2 if name == "branchnorm" else 1.0
    start, end = Signal(first.mean, first.variance, first.correlation), Gradient(last.gradient**2, last.gradient_correlation)
    theory = stack_points(case.model, Stack("decoder", 8), case.seq_len, warm, start, end)
    assert [(p.layer, p.sublayer) for p in points[1:]] == [(t.layer, t.sublayer) for t in theory]
    for got, want in zip(points[1:], theory):
        assert got.variance + got.mean**2 == pytest.approx(want.variance, rel=0.25), want
        assert got.correlation == pytest.approx(want.correlation, abs=cosine), want
        assert got.gradient == pytest.approx(want.gradient, rel=gradient), want


PROBED: dict[str, tuple[int, Parallel]] = {
    "tp sequence x zero3 x recompute": (4, Parallel(tp=2, tp_sequence=True, dp_shard=2, recompute="full")),
    "tp x ddp": (4, Parallel(tp=2, dp_replicate=2, dp_shard=1, engine="ddp")),
    "pipeline": (2, Parallel(pp=2, pp_schedule="zbv")),
    "context x tp sequence": (4, Parallel(cp=2, tp=2, tp_sequence=True)),
    "layered": (2, Parallel(accumulation="layered", dp_shard=2)),
}


@pytest.mark.dist
@pytest.mark.parametrize("layout", PROBED)
def test_the_probe_is_the_same_on_every_layout(layout: str) -> None:
    """Catches moments of a rank's own tokens, gradients counted once per rank, and looks taken twice under recomputation."""
    ranks, parallel = PROBED[layout]
    case = Case(scheme("deepnorm", num_layers=4, dropout=0.1), batch=8, seq_len=16)
    got = run_ranks(ranks, measured, replace(case, parallel=parallel))[-1]
    want = run_ranks(1, measured, case)[0]
    assert [p[:2] for p in got] == [p[:2] for p in want] and len(want) == 9
    for a, b in zip(got, want):
        assert a[2:] == pytest.approx(b[2:], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ["parallel", "deepnorm"])
def test_weight_gradients_make_up_the_norm(name: str) -> None:
    """Catches a sublayer whose weights are counted elsewhere: each is its own, and all with the ends together are the global norm."""
    from megascale.optim.clip import global_norm

    case = Case(scheme(name, tie_embeddings=True))
    points = [MeasuredMoments(*p) for p in measured(case)]
    model = build(case, 1)
    batches = [fake_batch(case, [n]) for n in range(case.batch)]
    build_schedule(model, case.parallel, CPU).run(batches, 1 / (case.batch * case.seq_len))
    squares = {w.name: w.local_grad.square().sum().item() for w in model.weights if w.local_grad is not None}
    for p in points[1:]:
        start = f"blocks.{p.layer}." + ("" if p.sublayer == "block" else p.sublayer)
        assert p.weight_gradient**2 == pytest.approx(sum(x for n, x in squares.items() if n.startswith(start)), rel=1e-12)
    total = math.sqrt(sum(p.weight_gradient**2 for p in points) + squares.get("final_norm.weight", 0.0))
    assert total == pytest.approx(global_norm(model.weights, 1).item(), rel=1e-12)


def test_warnings_in_words() -> None:
    """Catches a warning that never comes, and one that cries at a healthy stack."""

    def points(**by_layer: Any) -> list[MeasuredMoments]:
        healthy = {"mean": 0.0, "variance": 1.0, "correlation": 0.1, "gradient": 1.0, "gradient_correlation": 0.0, "weight_gradient": 1.0}
        start = MeasuredMoments(-1, "embedding", update=1.0, **healthy)
        return [start] + [
            MeasuredMoments(layer, kind, update=1.0, **{**healthy, **{k: f(layer) for k, f in by_layer.items()}})
            for layer in range(10)
            for kind in ("attention", "ffn")
        ]

    assert warnings(points()) == []
    assert "rank collapse" in warnings(points(correlation=lambda n: 0.1 * (n + 1)))[0]
    assert "beyond 0.9 from layer 9" in warnings(points(correlation=lambda n: 0.1 * (n + 1)))[0]
    assert "vanishing" in warnings(points(weight_gradient=lambda n: 10.0 ** (n - 9)))[0]
    assert "exploding" in warnings(points(weight_gradient=lambda n: 10.0**-n))[0]
    assert "growing stream" in warnings(points(variance=lambda n: 3.0**n))[0]
    assert "not finite" in warnings(points(variance=lambda n: math.inf if n == 4 else 1.0))[0]


def test_the_tool_writes_what_it_saw(tmp_path: Path) -> None:
    """Catches a tool that lost touch with its parts: a config with a branch period on its own tokens, as JSON and as a picture."""
    make_tokens(tmp_path / "tokens")
    values = settings(tmp_path, model__residual="branchnorm", model__branchnorm_period=10)
    found = measure(build_config(values), RankInfo(), CPU, 1e-4)
    write(found, tmp_path / "out" / "probe")
    read = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert len(read["points"]) == 5 and len(read["theory"]) == 4 and read["tokens"] == 16 and read["layout"] == "1 process"
    assert (tmp_path / "out" / "probe.png").stat().st_size > 10_000
    found = measure(build_config(settings(tmp_path, model__moe={"num_experts": 4, "ffn_size": 16})), RankInfo(), CPU, 1e-4)
    write(found, tmp_path / "experts")
    assert found["theory"] == [] and found["points"][-1]["weight_gradient"] > 0
