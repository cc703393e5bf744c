"""Parallel equals single: every axis, their products, and layouts drawn at random."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megascale.config.schema import Model, Optim, Parallel, RopeScaling
from tests.layouts import Case, tiny, train, worst
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist
EXACT = 1e-12

MODELS: dict[str, Model] = {
    "llama": tiny(),
    "gpt": tiny(norm="layernorm", ffn="gelu", position="learned", bias=True, num_kv_heads=4, tie_embeddings=True),
    "odd": tiny(norm="layernorm", ffn="relu", position="alibi", residual="post", num_kv_heads=1, qk_norm=True, sliding_window=5),
    "xpos": tiny(position="xpos", qk_norm=True, dropout=0.2, bias=True),
    "olmo": tiny(residual="res_post", qk_norm="width", num_kv_heads=4, rope_scaling=RopeScaling(type="yarn", factor=4, original_seq_len=8)),
}
LAYOUTS: dict[str, tuple[int, Parallel]] = {
    "zero3": (2, Parallel(dp_shard=2)),
    "zero3 on 3": (3, Parallel(dp_shard=3)),
    "zero2": (2, Parallel(dp_shard=2, reshard_after_forward=False)),
    "zero3 inside nodes": (4, Parallel(dp_shard=4, reshard_after_forward=2)),
    "replicas": (2, Parallel(dp_replicate=2, dp_shard=1)),
    "hsdp": (4, Parallel(dp_replicate=2, dp_shard=2)),
    "ddp": (2, Parallel(engine="ddp")),
    "ddp on 3": (3, Parallel(engine="ddp")),
    "tp": (2, Parallel(tp=2)),
    "tp beyond kv heads": (4, Parallel(tp=4)),
    "tp sequence": (2, Parallel(tp=2, tp_sequence=True)),
    "tp sequence 4": (4, Parallel(tp=4, tp_sequence=True)),
    "tp x zero3": (4, Parallel(tp=2, dp_shard=2)),
    "tp sequence x zero2": (4, Parallel(tp=2, tp_sequence=True, dp_shard=2, reshard_after_forward=False)),
    "tp x ddp": (4, Parallel(tp=2, dp_replicate=2, dp_shard=1, engine="ddp")),
    "full recompute": (1, Parallel(recompute="full")),
    "selective recompute": (1, Parallel(recompute="selective")),
    "tp sequence x zero3 x recompute": (4, Parallel(tp=2, tp_sequence=True, recompute="full")),
    "hsdp x selective": (4, Parallel(dp_replicate=2, dp_shard=2, recompute="selective")),
}


@lru_cache(maxsize=64)
def single_cached(case: str) -> dict[str, Any]:
    return run_ranks(1, train, CASES[case])[0]  # type: ignore[no-any-return]


CASES: dict[str, Case] = {}


def single(case: Case) -> dict[str, Any]:
    """The same training on one process, computed once a case."""
    alone = replace(case, parallel=Parallel())
    CASES[repr(alone)] = alone
    return single_cached(repr(alone))


def assert_equal(case: Case, ranks: int, bound: float = EXACT) -> None:
    assert_same(run_ranks(ranks, train, case)[0], single(case), case, bound)


def assert_same(got: dict[str, Any], reference: dict[str, Any], case: Case, bound: float = EXACT) -> None:
    """Losses, norms, first gradients and last weights of two trainings."""
    for key in ("loss", "norm"):
        gaps = [abs(a - b) / abs(b) for a, b in zip(got[key], reference[key])]
        assert max(gaps) <= bound, f"{key} differs by {max(gaps):.2e} on {case.parallel}"
    assert worst(got["grad"], reference["grad"])[0] <= bound
    # A weight whose gradient is zero but for rounding moves by the sign of that rounding under Adam: its path means nothing.
    moving = {n for n, g in reference["grad"].items() if g.abs().max() > 1e-9}
    kept = [{n: t for n, t in r["weight"].items() if n in moving} for r in (got, reference)]
    assert worst(*kept, amplified(reference["grad"], bound / 100, case.optim.lr * case.steps))[0] <= bound


def amplified(grads: dict[str, Tensor], rounding: float, path: float) -> dict[str, Tensor]:
    """How far each entry of the weights may move apart on a path of the length `path`, by rounding alone.

    An update divides an entry's gradient by its own size, be it ever so small beside the tensor's largest, whose size is what sums round
    by: `rounding` of it, of which fp64 promises 1e-14 (2e-15 is usual). A bias at 1e-5 of the largest thus moves by 1e-9 of a step more or
    less, under one order of sums as under another. An entry without a gradient has nothing to round.
    """
    found = {}
    for name, g in grads.items():
        size = g.abs()
        found[name] = (path * rounding * size.max() / size).clamp(max=2 * path).where(size > 0, 0.0)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_process(layout: str) -> None:
    """Catches a gradient that is averaged, counted twice, or left unsummed on any axis."""
    ranks, parallel = LAYOUTS[layout]
    assert_equal(Case(MODELS["llama"], parallel, packed=True), ranks)


@pytest.mark.parametrize(
    ("family", "parallel"),
    [("decoder", Parallel(tp=2, tp_sequence=True, recompute="full", accumulation="layered")), ("encoder", Parallel(tp=2, pp=2))],
)
def test_biases_by_distance(family: str, parallel: Parallel) -> None:
    """Catches a table whose heads are not cut as queries are, one that documents do not cut off, and one that a later stage does not get
    or that gets no gradient back from there.
    """
    model = tiny(family=family, position="relative", relative_buckets=6, relative_distance=7, attention_scale=0.7, ffn="geglu_tanh")
    assert_equal(Case(model, parallel, packed=family == "decoder", steps=2), 2 * parallel.pp)


@pytest.mark.parametrize("model", [m for m in MODELS if m != "llama"])
@pytest.mark.parametrize("layout", ["tp beyond kv heads", "tp sequence x zero3 x recompute", "hsdp x selective", "tp x ddp"])
def test_every_model_equals_one_process(model: str, layout: str) -> None:
    """Catches a part of a model that the tensor pass forgets: biases, positions, tied heads, replicated KV heads, dropout masks."""
    ranks, parallel = LAYOUTS[layout]
    cfg = MODELS[model]
    if model == "xpos":
        # Dropout's generator-free masks are compared too; QK-norm's gain of a shared head dimension is a sum over heads.
        assert cfg.dropout > 0
    assert_equal(Case(cfg, parallel, packed=model == "odd"), ranks)


@pytest.mark.parametrize("layout", ["zero3 on 3", "hsdp", "tp beyond kv heads", "tp x zero3", "tp x ddp"])
def test_muon_equals_one_process(layout: str) -> None:
    """Catches a part of a matrix orthogonalized instead of the whole, and results that come back to the wrong rank or rows."""
    ranks, parallel = LAYOUTS[layout]
    assert_equal(Case(MODELS["llama"], parallel, Optim(name="muon", lr=1e-3)), ranks)


def test_lion_equals_one_process() -> None:
    """Catches Lion reading a padded row. Its step is a sign, which rounding may turn where a gradient is zero: losses are compared."""
    case = Case(MODELS["llama"], Parallel(tp=2, dp_shard=2), Optim(name="lion", lr=1e-3))
    reference, got = single(case), run_ranks(4, train, case)[0]
    assert max(abs(a - b) for a, b in zip(got["loss"], reference["loss"])) <= 1e-6


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("layout", ["zero3", "tp sequence x zero2", "tp x ddp"])
def test_single_and_mixed_precision(precision: str, bound: float, layout: str) -> None:
    """Catches a pass that loses a cast: fp32 rounds at 6e-8 and bf16 at 4e-3, sums of tens of terms stay within these bounds."""
    ranks, parallel = LAYOUTS[layout]
    case = Case(MODELS["llama"], parallel, precision=precision)
    reference, got = single(case), run_ranks(ranks, train, case)[0]
    assert max(abs(a - b) / abs(b) for a, b in zip(got["loss"], reference["loss"])) <= bound
    assert worst(got["grad"], reference["grad"])[0] <= 4 * bound


def test_batches_that_do_not_divide() -> None:
    """Catches padding rows that count in the loss: 5 samples on 3 ranks leave empty places."""
    assert_equal(Case(MODELS["llama"], Parallel(dp_shard=3), batch=5), 3)


HUNDRED = [("tp x zero3", 30), *(pytest.param(x, 100, marks=pytest.mark.slow) for x in ("zero3", "tp", "zero3 on 3", "tp x zero3"))]


@pytest.mark.parametrize(("layout", "steps"), HUNDRED)
def test_many_steps_in_fp32(layout: str, steps: int) -> None:
    """Catches drift: at lr 3e-3 the curves of 1, 2, 3 and 4 ranks stay within 1e-4."""
    ranks, parallel = LAYOUTS[layout]
    case = Case(MODELS["llama"], parallel, Optim(lr=3e-3), "fp32", steps=steps, keep_tensors=False, batch=6)
    reference, got = single(case), run_ranks(ranks, train, case, timeout=150)[0]
    assert max(abs(a - b) / abs(b) for a, b in zip(got["loss"], reference["loss"])) <= 1e-4
    assert reference["loss"][-1] < reference["loss"][0]


@st.composite
def random_case(draw: st.DrawFn) -> tuple[int, Case]:
    """A model and a layout that the support table allows, on up to 4 ranks."""
    tp = draw(st.sampled_from([1, 2, 4]))
    ranks = tp * draw(st.sampled_from([1, 2] if tp < 4 else [1]))
    ranks = ranks if ranks > 1 else draw(st.sampled_from([2, 3, 4]))
    data = ranks // tp
    engine = draw(st.sampled_from(["fsdp2", "ddp"]))
    shard = 1 if engine == "ddp" else draw(st.sampled_from([n for n in (1, 2, 3, 4) if data % n == 0]))
    parallel = Parallel(
        accumulation="depth_first" if engine == "ddp" else draw(st.sampled_from(["depth_first", "layered"])),
        tp=tp,
        dp_shard=shard,
        dp_replicate=data // shard,
        engine=engine,
        tp_sequence=draw(st.booleans()),
        reshard_after_forward=draw(st.booleans()),
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
    )
    model = tiny(
        norm=draw(st.sampled_from(["rmsnorm", "layernorm", "dyt"])),
        ffn=draw(st.sampled_from(["swiglu", "gelu", "gelu_tanh", "relu"])),
        position=draw(st.sampled_from(["rope", "alibi", "learned", "xpos"])),
        residual=draw(st.sampled_from(["pre", "post", "res_post", "deepnorm", "deepscale", "subln", "layerscale", "parallel"])),
        num_kv_heads=draw(st.sampled_from([1, 2, 4])),
        tie_embeddings=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.1])),
        vocab_size=draw(st.integers(30, 41)),
        num_layers=draw(st.integers(1, 3)),
    )
    case = Case(
        model,
        parallel,
        batch=draw(st.integers(3, 6)),
        micro_batch=draw(st.integers(1, 2)),
        packed=draw(st.booleans()),
        steps=2,
    )
    return ranks, case


@given(random_case())
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_random_layouts(drawn: tuple[int, Case]) -> None:
    """Catches what nobody thought of combining."""
    ranks, case = drawn
    assert_equal(case, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_products(recompute: str) -> None:
    """Catches a graph that swallows an exchange between ranks, or recomputation that breaks inside it."""
    parallel = Parallel(tp=2, tp_sequence=True, dp_shard=2, compile=True, recompute=recompute)  # type: ignore[arg-type]
    case = Case(MODELS["llama"], parallel, precision="fp32")
    reference, got = single(case), run_ranks(4, train, case, timeout=170)[0]
    assert max(abs(a - b) / abs(b) for a, b in zip(got["loss"], reference["loss"])) <= 2e-5
    assert worst(got["grad"], reference["grad"])[0] <= 1e-4
