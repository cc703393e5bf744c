"""Expert parallelism: equal to one process on every layout, exact in bytes and memory, and seen in metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megascale.config.schema import Model, Optim, Parallel
from megascale.model.experts import MixtureOfExperts
from tests import runs
from tests.layouts import Case, build, tiny, train, worst
from tests.ranks import run_ranks
from tests.test_layouts import assert_equal, single

pytestmark = pytest.mark.dist


def sparse(layers: int = 2, **keys: Any) -> Model:
    return tiny(num_layers=layers, moe={"num_experts": 4, "top_k": 2, "ffn_size": 16, "aux_loss": 0.1, "z_loss": 0.01, **keys})


MODELS: dict[str, Model] = {
    "shared": sparse(num_shared=1),
    "bias": sparse(router="sigmoid", balance="bias", bias_rate=0.1),
    "capacity": sparse(router="softmax_topk", capacity_factor=0.7),
    "entropy": sparse(balance="entropy", num_shared=1),
    "xmoe": sparse(3, router="xmoe", every=2, top_k=1),
    "deepseek": sparse(
        num_experts=8, top_k=3, router="sigmoid", balance="bias", bias_rate=0.1, sequence_loss=0.3, num_shared=1, groups=4, top_groups=2,
        routed_scale=2.5,
    ),
    "qwen": sparse(router="softmax_topk", renormalize=True, num_shared=1, shared_gate=True, balance_over="batch"),
    "gpt-oss": sparse(expert_bias=True, router_bias=True, balance_over="batch").model_copy(update={"ffn": "swiglu_clamped"}),
}  # fmt: skip
# How many ranks, the layout, and the model that it is tried with.
LAYOUTS: dict[str, tuple[int, Parallel, str]] = {
    "no ep: zero3": (2, Parallel(dp_shard=2), "gpt-oss"),
    "no ep: tp x zero3": (4, Parallel(tp=2, dp_shard=2), "xmoe"),
    "no ep: ddp": (2, Parallel(engine="ddp"), "qwen"),
    "ep": (2, Parallel(ep=2), "shared"),
    "ep, capacity": (2, Parallel(ep=2), "capacity"),
    "ep 4, full recompute": (4, Parallel(ep=4, recompute="full"), "deepseek"),
    "ep x edp, selective": (4, Parallel(ep=2, recompute="selective"), "deepseek"),
    "ep x edp, zero2": (4, Parallel(ep=2, reshard_after_forward=False), "xmoe"),
    "ep x replicas": (4, Parallel(dp_replicate=2, ep=2), "bias"),
    "ep, two rounds": (2, Parallel(ep=2, ep_rows=1.0), "capacity"),
    "ep x edp, two rounds": (4, Parallel(ep=2, ep_rows=1.4, recompute="selective"), "gpt-oss"),
    "ep x tp": (4, Parallel(tp=2, ep=2), "gpt-oss"),
    "ep x tp sequence": (4, Parallel(tp=2, tp_sequence=True, ep=2, recompute="full"), "capacity"),
    "tp, shared gate": (2, Parallel(tp=2), "qwen"),
    "tp sequence, shared gate": (2, Parallel(tp=2, tp_sequence=True), "qwen"),
    "whole experts over tp": (2, Parallel(tp=2, tp_sequence=True, etp=1, ep=2), "deepseek"),
    "whole experts over tp and dp": (4, Parallel(tp=2, tp_sequence=True, etp=1, ep=4), "qwen"),
    "whole experts x edp": (4, Parallel(tp=2, tp_sequence=True, etp=1, ep=2), "entropy"),
    "no ep: ring": (2, Parallel(cp=2), "entropy"),
    "ep over cp": (2, Parallel(cp=2, ep=2), "deepseek"),
    "ep over cp and dp": (4, Parallel(cp=2, cp_method="ulysses", ep=4), "gpt-oss"),
    "ep x edp over cp": (4, Parallel(cp=2, ep=2), "entropy"),
    "whole experts over tp and cp": (4, Parallel(tp=2, tp_sequence=True, etp=1, cp=2, ep=4), "qwen"),
    "layered, ep x edp": (4, Parallel(ep=2, accumulation="layered", recompute="full"), "deepseek"),
    "layered, ep x replicas": (4, Parallel(ep=2, dp_replicate=2, accumulation="layered", recompute="selective"), "gpt-oss"),
    "whole experts, sharded only, x pp": (4, Parallel(pp=2, tp=2, tp_sequence=True, etp=1, recompute="selective"), "bias"),
    "whole experts, sharded only": (2, Parallel(tp=2, tp_sequence=True, etp=1), "xmoe"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_process(layout: str) -> None:
    """Catches gradients of experts that are summed over the wrong ranks, auxiliary losses counted by every tensor rank, biases moved by the
    load of a part of the batch, and gathers of experts inside a block that selective recomputation counts and does not find again.
    """
    ranks, parallel, model = LAYOUTS[layout]
    assert_equal(Case(MODELS[model], parallel, packed=True), ranks)


SCHEDULES = {"1f1b": 1, "looped_bfs": 2, "interleaved_zero_bubble": 2, "zbv": 2, "dualpipev": 2}
OF_SCHEDULE = {"zbv": "gpt-oss", "interleaved_zero_bubble": "deepseek", "dualpipev": "qwen"}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_equals_one_process(schedule: str) -> None:
    """Catches weight gradients of grouped products that a split backward loses or adds twice, and losses of middle stages."""
    parallel = Parallel(
        pp=2,
        pp_schedule=schedule,  # type: ignore[arg-type]
        pp_virtual=SCHEDULES[schedule],
        ep=2,
        recompute="full" if schedule == "zbv" else "none",
    )
    model = MODELS[OF_SCHEDULE[schedule]].model_copy(update={"num_layers": 4}) if schedule in OF_SCHEDULE else sparse(4, balance="bias")
    assert_equal(Case(model, parallel, batch=8), 4)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-5), ("bf16", 2e-2)])
def test_single_and_mixed_precision(precision: str, bound: float) -> None:
    """Catches the grouped product's own paths: fp64 takes the loop. With two of two experts no rounding can change the choice."""
    for ranks, parallel in ((2, Parallel(ep=2)), (4, Parallel(pp=2, pp_schedule="zbv", ep=2))):
        case = Case(sparse(4, num_experts=2), parallel, precision=precision, batch=8)
        reference, got = single(case), run_ranks(ranks, train, case)[0]
        assert max(abs(a - b) / abs(b) for a, b in zip(got["loss"], reference["loss"])) <= bound
        assert worst(got["grad"], reference["grad"])[0] <= 4 * bound


def test_mixed_precision_under_ddp() -> None:
    """Catches micro-batches whose gradients DDP never sees: on CPUs a later one is added to the sum that is there, and none comes back.

    Each micro-batch rounds alike on both sides; what differs is the order in which fp32 sums four of them.
    """
    case = Case(MODELS["shared"], Parallel(engine="ddp"), precision="bf16", steps=1)
    got, reference = run_ranks(2, train, case)[0], single(case)
    assert worst(got["grad"], reference["grad"])[0] <= 1e-5
    assert got["loss"] == pytest.approx(reference["loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks(recompute: str) -> None:
    """Catches a graph that swallows an exchange, or a mixture that breaks inside one."""
    parallel = Parallel(tp=2, tp_sequence=True, ep=2, compile=True, recompute=recompute)  # type: ignore[arg-type]
    groups = {} if recompute == "none" else {"groups": 2, "top_groups": 2}
    model = sparse(num_experts=2, expert_bias=True, router_bias=True, num_shared=1, shared_gate=True, **groups)
    case = Case(model, parallel, precision="fp32")
    reference, got = single(case), run_ranks(4, train, case, timeout=170)[0]
    assert max(abs(a - b) / abs(b) for a, b in zip(got["loss"], reference["loss"])) <= 2e-5
    assert worst(got["grad"], reference["grad"])[0] <= 1e-4


@st.composite
def random_case(draw: st.DrawFn) -> tuple[int, Case]:
    """A mixture and a layout of up to 4 ranks that the support table allows."""
    ep, tp, cp = draw(st.sampled_from([(1, 1, 2), (2, 1, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1), (4, 2, 1), (4, 1, 2), (1, 2, 1)]))
    whole = tp > 1 and (ep == 4 or draw(st.booleans()))
    replicas = draw(st.sampled_from([1, 2])) if ep * tp * cp == 2 else 1
    parallel = Parallel(
        ep=ep,
        tp=tp,
        cp=cp,
        etp=1 if whole else None,
        tp_sequence=whole or draw(st.booleans()),
        dp_replicate=replicas,
        dp_shard=max(1, 4 // (tp * cp * replicas)),
        reshard_after_forward=draw(st.booleans()),
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
    )
    capacity = None if whole or cp > 1 else draw(st.sampled_from([None, 0.6, 1.25]))
    shared, balance = draw(st.integers(0, 2)), draw(st.sampled_from(["loss", "entropy", "bias", "none"]))
    model = sparse(
        draw(st.integers(1, 3)),
        num_experts=draw(st.sampled_from([4, 8])),
        top_k=draw(st.integers(1, 3)),
        num_shared=shared,
        router=draw(st.sampled_from(["topk_softmax", "softmax_topk", "sigmoid", "sigma", "xmoe"])),
        balance=balance,
        capacity_factor=capacity,
        renormalize=draw(st.sampled_from([None, True, False])),
        routed_scale=draw(st.sampled_from([1.0, 1.8])),
        **draw(st.sampled_from([{}, {"groups": 4, "top_groups": 3}, {"groups": 2, "top_groups": 2, "group_score": "max"}])),
        router_bias=draw(st.booleans()),
        expert_bias=draw(st.booleans()),
        shared_gate=shared > 0 and draw(st.booleans()),
        sequence_loss=draw(st.sampled_from([0.0, 0.2])) if balance == "bias" else 0.0,
        balance_over=draw(st.sampled_from(["sequence", "batch"])) if balance == "loss" else "sequence",
    )
    ffn = draw(st.sampled_from(["swiglu", "gelu", "relu", "swiglu_clamped"]))
    model = model.model_copy(update={"ffn": ffn, "dropout": draw(st.sampled_from([0.0, 0.1]))})
    return 4, Case(model, parallel, batch=draw(st.integers(3, 6)), packed=draw(st.booleans()), steps=2)


@given(random_case())
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_random_layouts(drawn: tuple[int, Case]) -> None:
    """Catches what nobody thought of combining."""
    assert_equal(drawn[1], drawn[0])


def test_muon_orthogonalizes_each_expert() -> None:
    """Catches a bank that is taken for one matrix, and an expert whose parts lie on other ranks."""
    case = Case(MODELS["shared"], Parallel(tp=2, ep=2), Optim(name="muon", lr=1e-3))
    reference, got = single(case), run_ranks(4, train, case)[0]
    assert max(abs(a - b) for a, b in zip(got["loss"], reference["loss"])) <= 1e-12


def test_empty_places_count_nowhere() -> None:
    """Catches padding rows in the balance losses and in the load that moves biases: 5 samples on 3 ranks."""
    assert_equal(Case(sparse(num_experts=3, balance="bias", bias_rate=0.1), Parallel(ep=3), batch=5), 3)


def test_fewer_tokens_than_experts() -> None:
    """Catches shapes that assume a row for every expert: 3 tokens per rank, 8 experts."""
    assert_equal(Case(sparse(num_experts=8), Parallel(ep=2), seq_len=3, batch=2), 2)


MOE = {"num_experts": 4, "top_k": 2, "ffn_size": 16, "balance": "bias", "bias_rate": 0.05, "router": "sigmoid"}


def half(folder: str, parallel: dict[str, Any], stop_at: int | None) -> int:
    values = {**runs.settings(Path(folder)), "parallel": parallel}
    batch = {"num_experts": 8, "ffn_size": 16, "groups": 4, "top_groups": 2, "balance_over": "batch"}
    values["model"] |= {"kinds": {"batch": {"moe": batch}, "biased": {"moe": MOE}}, "pattern": ["batch", "biased"]}
    return runs.run(values, stop_at)[0]


def test_resumed_at_another_ep(tmp_path: Path) -> None:
    """Catches experts that a checkpoint puts in the wrong place, biases that start again from zero, a load of the last batch that is
    forgotten, layers of different numbers of experts whose counts are mixed up, and rows of metrics without load.
    """
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        runs.make_tokens(tmp_path / folder / "tokens")
    assert run_ranks(1, half, str(tmp_path / "a"), {}, None) == [0]
    assert run_ranks(4, half, str(tmp_path / "b"), {"ep": 4}, 3) == [75] * 4
    assert run_ranks(4, half, str(tmp_path / "b"), {"pp": 2, "ep": 2}, None) == [0] * 4
    one, two = runs.losses(tmp_path / "a"), runs.losses(tmp_path / "b")
    assert max(abs(x - y) for x, y in zip(one, two)) <= 1e-12 and len(two) == 6
    weights = [runs.weights_at(tmp_path / f, 6) for f in ("a", "b")]
    assert weights[0]["model.blocks.1.ffn.router.bias"].abs().max() > 0
    assert (weights[0]["model.blocks.0.ffn.router.share"] - 1 / 8).abs().max() > 0.01
    assert all((weights[0][n] - weights[1][n]).abs().max() <= 1e-12 for n in weights[0] if n.startswith("model."))
    for a, b in zip(runs.rows(tmp_path / "a"), runs.rows(tmp_path / "b")):
        told = dict(a["experts"])
        assert (told.pop("layers"), told.pop("parts")) == ([0, 1], ["ffn", "ffn"])
        for name, values in told.items():
            assert values == pytest.approx(b["experts"][name], rel=1e-9), name
        assert 1.0 <= a["experts"]["load_max_over_mean"][1] <= 4.0 and b["sent_bytes"]["ep"] > 0


@pytest.mark.parametrize(("top_k", "shared"), [(1, 0), (2, 0), (4, 0), (2, 1)])
def test_experts_under_deepscale_are_as_large_as_one(top_k: int, shared: int) -> None:
    """Catches gates that sum to one taken for a branch of unit variance: two even experts would have half of it, and a shared one adds its
    own.
    """
    sizes = {"hidden_size": 128, "num_kv_heads": 4, "ffn_size": 512, "ffn": "relu", "residual": "deepscale"}
    cfg = tiny(**sizes, moe={"num_experts": 8, "top_k": top_k, "ffn_size": 256, "num_shared": shared, "router": "topk_softmax"})
    moe = build(Case(cfg), 1).model.get_submodule("blocks.0.ffn")
    assert isinstance(moe, MixtureOfExperts) and moe.unit_gates
    x = torch.randn(4, 200, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = moe(x, None)
    assert y.var().item() == pytest.approx(1.0, rel=0.1)


def test_unit_gates_equal_one_process() -> None:
    """Catches a part of a sum divided by the size of that part."""
    cfg = sparse(num_shared=1, shared_gate=True).model_copy(update={"residual": "deepscale"})
    assert_equal(Case(cfg, Parallel(tp=2, tp_sequence=True, ep=2), steps=2), 4)
