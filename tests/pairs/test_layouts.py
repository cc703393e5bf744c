"""Encoder–decoders equal one process on every layout, and a run of theirs is one curve through stops and layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megascale.config.schema import Model, Parallel
from tests.depth.test_moments import measured
from tests.layouts import Case, tiny, train
from tests.pairs.files import make_pairs, pair_settings
from tests.ranks import run_ranks
from tests.runs import losses, rows, run
from tests.test_layouts import assert_equal

pytestmark = pytest.mark.dist


def pair(**changes: Any) -> Model:
    return tiny(**{"family": "encoder_decoder", "encoder_layers": 3, "num_layers": 2, **changes})


# Between them every residual scheme, norm, activation, kind of head and vocabulary.
MODELS: dict[str, Model] = {
    "llama": pair(),
    "separate": pair(
        norm="layernorm", ffn="gelu", position="learned", bias=True, dropout=0.2, share_embeddings=False, source_vocab_size=29
    ),
    "deepnorm": pair(residual="deepnorm", qk_norm=True, num_kv_heads=1, tie_embeddings=True, encoder_layers=1, num_layers=3),
    "branchnorm": pair(residual="branchnorm", branchnorm_period=5, ffn="gelu"),
    "deepscale": pair(residual="deepscale", norm="layernorm", bias=True, tie_embeddings=True, dropout=0.1),
    "deepscale_post": pair(residual="deepscale_post", ffn="relu", num_kv_heads=4),
    "subln": pair(residual="subln", norm="layernorm"),
    "layerscale": pair(residual="layerscale", norm="dyt"),
    "parallel": pair(residual="parallel", dropout=0.1),
    "mus": pair(residual="mus", norm="layernorm", tie_embeddings=True),
    "bitlinear": pair(linear="bitlinear", num_kv_heads=1, bias=True),
    "experts": pair(moe={"num_experts": 4, "ffn_size": 16, "every": 2}, encoder_layers=2),
    "t5": pair(
        position="relative",
        relative_buckets=8,
        relative_distance=9,
        attention_scale=1.0,
        ffn="geglu_tanh",
        head_dim=10,
        tie_embeddings=True,
        head_scale=24**-0.5,
        dropout=0.1,
        num_kv_heads=4,
    ),
    "odd": pair(residual="post", norm="layernorm", num_kv_heads=1, qk_norm=True),
}
LAYOUTS: dict[str, tuple[int, Parallel]] = {
    "zero3 on 3": (3, Parallel(dp_shard=3)),
    "hsdp x selective": (4, Parallel(dp_replicate=2, dp_shard=2, recompute="selective")),
    "tp beyond kv heads": (4, Parallel(tp=4)),
    "tp x ddp": (4, Parallel(tp=2, dp_replicate=2, dp_shard=1, engine="ddp")),
    "tp sequence x zero3 x recompute": (4, Parallel(tp=2, tp_sequence=True, dp_shard=2, recompute="full")),
    "nested x zero3": (2, Parallel(dp_shard=2, recompute="nested")),
    "1f1b": (2, Parallel(pp=2)),
    "stages of one side": (3, Parallel(pp=3, pp_layers=(3, 1, 1))),
    "zbv": (2, Parallel(pp=2, pp_schedule="zbv")),
    "looped x tp sequence": (4, Parallel(pp=2, pp_schedule="looped_bfs", pp_virtual=2, tp=2, tp_sequence=True)),
    "layered": (2, Parallel(dp_shard=2, accumulation="layered", recompute="full", offload=("activations",))),
    "ring": (3, Parallel(cp=3)),
    "ulysses x tp sequence": (4, Parallel(cp=2, cp_method="ulysses", tp=2, tp_sequence=True)),
    "ring of ulysses": (4, Parallel(cp=4, cp_ulysses=2)),
    "ring x 1f1b": (4, Parallel(cp=2, pp=2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_process(layout: str) -> None:
    """Catches a memory whose gradient is lost between stages or summed twice over tensor ranks, and sources cut as targets are."""
    ranks, parallel = LAYOUTS[layout]
    assert_equal(Case(MODELS["llama"], parallel, batch=5 if ranks == 3 and parallel.pp == 1 else 4), ranks)


# Everything on a product of axes once; the rest of the product is slow.
QUICK = {
    ("separate", "looped x tp sequence"),
    ("separate", "tp beyond kv heads"),
    ("deepnorm", "zbv"),
    ("branchnorm", "1f1b"),
    ("deepscale", "1f1b"),
    ("deepscale_post", "layered"),
    ("subln", "tp x ddp"),
    ("layerscale", "zbv"),
    ("parallel", "layered"),
    ("mus", "zbv"),
    ("bitlinear", "tp x ddp"),
    ("experts", "1f1b"),
    ("t5", "looped x tp sequence"),
    ("odd", "tp x ddp"),
    ("separate", "ring x 1f1b"),
    ("experts", "ring"),
}


@pytest.mark.parametrize(
    ("model", "layout"),
    [pytest.param(m, x, marks=() if (m, x) in QUICK else pytest.mark.slow) for m in MODELS if m != "llama" for x in LAYOUTS],
)
def test_every_model_equals_one_process(model: str, layout: str) -> None:
    """Catches statistics, learned scalars and coefficients that a pass forgets in the third sublayer, dropout masks that the two stacks
    share, a table of sources cut by the targets' rows, and experts that choose for what is not there.
    """
    ranks, parallel = LAYOUTS[layout]
    cfg = MODELS[model]
    if parallel.pp == 3 and cfg.total_layers != 5:
        pytest.skip("needs five layers")
    assert_equal(Case(cfg, parallel, steps=2), ranks)


def test_experts_over_ranks() -> None:
    """Catches a pass that deals out the decoder's experts and not the encoder's."""
    assert_equal(Case(MODELS["experts"], Parallel(ep=2, dp_shard=2), steps=2), 2)


def test_bytes_between_stages() -> None:
    """Catches a memory that travels apart from the stream or twice: each micro-batch sends source and target once each way."""
    parallel = Parallel(pp=2, pp_layers=(4, 1))
    case = Case(MODELS["llama"], parallel, steps=1, keep_tensors=False)
    for rank in run_ranks(2, train, case):
        assert rank["sent"] == {"pp": 4 * (case.source_len + case.seq_len) * 24 * 8}


def test_fp8_products_on_a_pipeline() -> None:
    """Catches keys and values of the memory multiplied otherwise than the rest: static FP8 is bit for bit the same on other stages."""
    cfg = pair(residual="mus", hidden_size=32, num_heads=2, num_kv_heads=2)
    found = [
        run_ranks(n, train, Case(cfg, p, precision="fp32", fp8="static", steps=2))[0]["loss"]
        for n, p in ((1, Parallel()), (2, Parallel(pp=2, pp_schedule="zbv")))
    ]
    exact = run_ranks(1, train, Case(cfg, precision="fp32", steps=2))[0]["loss"]
    assert found[0] == found[1] != exact and found[0] == pytest.approx(exact, rel=1e-2)


@pytest.mark.slow
def test_compiled_blocks_equal_eager_ones() -> None:
    """Catches a mask of valid keys that compiled attention does not get."""
    parallel = Parallel(tp=2, tp_sequence=True, dp_shard=2, compile=True)
    assert_equal(Case(MODELS["llama"], parallel, precision="fp32", steps=2), 4, bound=1e-4)


@pytest.mark.parametrize("objective", ["translation", "span_corruption"])
def test_one_curve_through_a_stop_and_other_layouts(tmp_path: Path, objective: str) -> None:
    """Catches pairs, gaps or an order that depend on ranks or on the moment of a resume, and an evaluation on other pairs."""
    prefix = make_pairs(tmp_path / "pairs")
    changes = {"data__objective": objective, "data__valid_fraction": 0.2, "train__eval_every": 3, "data__train": prefix}
    if objective == "span_corruption":
        changes |= {"data__train": prefix + ".source", "model__vocab_size": 140}
    straight = pair_settings(tmp_path, **changes)
    assert run_ranks(1, run, straight) == [(0, "done")]
    other = tmp_path / "other"
    other.mkdir()
    values = pair_settings(other, **changes, parallel__tp=2, parallel__tp_sequence=True)
    assert {c for c, _ in run_ranks(2, run, values, 3)} == {75}
    assert {c for c, _ in run_ranks(4, run, {**values, "parallel": {"pp": 2, "cp": 2}})} == {0}
    assert max(abs(a - b) / b for a, b in zip(losses(other), losses(tmp_path))) <= 1e-12
    valid = [[r["valid_loss"] for r in rows(f) if "valid_loss" in r] for f in (tmp_path, other)]
    assert all(a == pytest.approx(b, rel=1e-12) for a, b in zip(*valid)) and len(valid[0]) == 2


PROBED: dict[str, tuple[int, Parallel]] = {
    "tp sequence x zero3 x nested": (4, Parallel(tp=2, tp_sequence=True, dp_shard=2, recompute="nested")),
    "stages": (2, Parallel(pp=2, pp_layers=(2, 3))),
}


@pytest.mark.parametrize(("name", "layout"), [("separate", "stages"), ("deepnorm", "tp sequence x zero3 x nested")])
def test_the_probe_sees_both_stacks(name: str, layout: str) -> None:
    """Catches layers of the two stacks that fall into one row, and a stream looked at before another sublayer than the one it left."""
    ranks, parallel = PROBED[layout]
    case = Case(MODELS[name], batch=8)
    got, want = run_ranks(ranks, measured, replace(case, parallel=parallel))[-1], run_ranks(1, measured, case)[0]
    before, after = case.model.encoder_layers or 0, case.model.num_layers
    kinds = [("attention", "ffn")] * before + [("attention", "cross", "ffn")] * after
    names = [(layer, kind) for layer, of_layer in enumerate(kinds) for kind in of_layer]
    assert [p[:2] for p in want] == [(-1, "source"), *names[: 2 * before], (-1, "embedding"), *names[2 * before :]]
    for a, b in zip(got, want, strict=True):
        assert a[:2] == b[:2] and a[2:] == pytest.approx(b[2:], rel=1e-9, abs=1e-12)
    for layer, kind, *values in want:
        # Every sublayer has weights that learn, and every stream behind one is another.
        assert layer < 0 or values[5] > 0, (layer, kind)
    assert len({p[3] for p in want}) == len(want)
