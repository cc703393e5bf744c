"""Every scheme equals one process on every layout; BranchNorm's warm-up is one curve through stops and resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import Allocations
from megascale.config.load import build_config
from megascale.config.schema import Parallel
from megascale.launch.ranks import RankInfo
from megascale.model import decoder
from megascale.train.setup import build_trainer
from tests.depth.test_table import scheme
from tests.layouts import Case, build
from tests.ranks import run_ranks
from tests.runs import losses, make_tokens, run, settings, weights_at
from tests.test_layouts import assert_equal

pytestmark = pytest.mark.dist

LAYOUTS: dict[str, tuple[int, Parallel]] = {
    "tp": (2, Parallel(tp=2)),
    "tp sequence x zero3 x recompute": (4, Parallel(tp=2, tp_sequence=True, dp_shard=2, recompute="full")),
    "pipeline": (2, Parallel(pp=2, pp_schedule="zbv")),
}
# Each with a norm, an activation and heads of its own, so that the product stays small.
MODELS: dict[str, dict[str, Any]] = {
    "deepnorm": {"num_kv_heads": 1, "dropout": 0.1, "tie_embeddings": True},
    "branchnorm": {"ffn": "gelu"},
    "deepscale": {"norm": "layernorm", "bias": True, "tie_embeddings": True, "dropout": 0.1, "position": "learned"},
    "deepscale_post": {"ffn": "relu", "num_kv_heads": 4},
    "subln": {"norm": "layernorm", "bias": True},
    "layerscale": {"norm": "dyt", "qk_norm": True},
    "parallel": {"dropout": 0.1},
    "neox": {"norm": "layernorm", "bias": True, "rope_fraction": 0.5, "dropout": 0.1},
    "subln with dyt": {"norm": "dyt"},
    "deepnorm encoder": {"family": "encoder", "num_kv_heads": 1, "position": "learned"},
    "bitlinear": {"linear": "bitlinear", "num_kv_heads": 1, "bias": True},
    "bitlinear subln": {"linear": "bitlinear"},
    "mus": {"norm": "layernorm", "bias": True, "tie_embeddings": True, "num_kv_heads": 1},
}


# Everything on a product of axes; statistics over a cut dimension also on tp alone; on a pipeline what a stage could miss.
STAGED = ("branchnorm", "deepscale", "layerscale", "bitlinear subln", "mus")
QUICK = [(m, x) for m in MODELS for x in LAYOUTS if " x " in x or (x == "tp" and "subln" in m) or (x == "pipeline" and m in STAGED)]


@pytest.mark.parametrize(("name", "layout"), QUICK)
def test_every_scheme_equals_one_process(name: str, layout: str) -> None:
    """Catches statistics of inner norms or quantized products over a part, learned scalars whose gradient is a share, a coefficient or a
    step that does not reach a stage.
    """
    ranks, parallel = LAYOUTS[layout]
    residual = {"bitlinear": "pre"}.get(name, name.split()[-1] if name.startswith("bitlinear") else name.split()[0])
    cfg = scheme(residual, **{"num_layers": 4, **MODELS[name]})
    assert_equal(Case(cfg, parallel, packed=name in ("deepnorm", "subln", "deepnorm encoder")), ranks)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (3, Parallel(cp=3)),
        (2, Parallel(cp=2, cp_method="ulysses")),
        (4, Parallel(cp=4, cp_ulysses=2)),
        (4, Parallel(cp=2, tp=2, tp_sequence=True, recompute="full")),
    ],
)
def test_an_encoder_cut_along_the_sequence(ranks: int, parallel: Parallel, packed: bool) -> None:
    """Catches a ring that hides what comes later, or that hides another document only where it comes later."""
    cfg = scheme("deepnorm", family="encoder", num_kv_heads=2, position="rope")
    assert_equal(Case(cfg, parallel, packed=packed, seq_len=16, steps=2), ranks)


NESTED: dict[str, tuple[int, Parallel]] = {
    "alone": (1, Parallel(recompute="nested")),
    "tp sequence x zero3": (4, Parallel(tp=2, tp_sequence=True, dp_shard=2, recompute="nested")),
    "hsdp, ring": (4, Parallel(cp=2, dp_replicate=2, dp_shard=1, recompute="nested")),
    "zbv": (2, Parallel(pp=2, pp_schedule="zbv", recompute="nested")),
    "ddp": (2, Parallel(engine="ddp", recompute="nested")),
}


@pytest.mark.parametrize("layout", NESTED)
def test_nested_recomputation(layout: str) -> None:
    """Catches groups that overlap or miss a block, and one that FSDP2 gathers for its second forward and never lets go: seven blocks are
    groups of three, three and one.
    """
    ranks, parallel = NESTED[layout]
    assert_equal(Case(scheme("deepnorm", num_layers=7, dropout=0.1), parallel, steps=2), ranks)


def kept(recompute: str, layers: int) -> int:
    """Bytes that autograd holds between forward and backward."""
    case = Case(scheme("deepnorm", num_layers=layers), Parallel(recompute=recompute))  # type: ignore[arg-type]
    model, tokens = build(case, 1), torch.zeros(1, case.seq_len, dtype=torch.int64)
    with Allocations() as seen:
        loss = model.module(tokens, tokens, scale=1.0)
        held = seen.now
        loss.backward()
    return held // (case.seq_len * case.model.hidden_size * 8)


def test_nested_recomputation_keeps_the_root_of_the_blocks() -> None:
    """Catches an inner checkpoint that keeps its input although a group around it does it again: 16 blocks are four groups."""
    more = {mode: run_ranks(1, kept, mode, 16)[0] - run_ranks(1, kept, mode, 4)[0] for mode in ("full", "nested")}
    assert more == {"full": 12, "nested": 2}


def test_tp_beyond_kv_heads_with_quantized_rows() -> None:
    """Catches a quantized weight held whole whose mean is taken over the rows in use."""
    assert_equal(Case(scheme("subln", linear="bitlinear", num_kv_heads=2), Parallel(tp=4)), 4)


@pytest.mark.parametrize("parallel", [{"engine": "ddp"}, {"dp_shard": 2}, {"pp": 2}])
def test_resume_inside_branchnorms_warm_up(tmp_path: Path, parallel: dict[str, Any]) -> None:
    """Catches a coefficient that starts again at a resume, or that evaluation sets: steps 1…6 of a period of 8, stopped after 3."""
    make_tokens(tmp_path / "tokens")
    model = {"model__residual": "branchnorm", "model__branchnorm_period": 8, "train__eval_every": 2, "data__valid_fraction": 0.2}
    straight = settings(tmp_path, **model)
    assert run_ranks(1, run, straight) == [(0, "done")]
    again = tmp_path / "again"
    again.mkdir()
    values = settings(again, **model, **{f"parallel__{k}": v for k, v in parallel.items()})
    values["data"] = straight["data"]
    assert {c for c, _ in run_ranks(2, run, values, 3)} == {75}
    assert run_ranks(1, run, {**values, "parallel": {}}) == [(0, "done")]
    assert max(abs(a - b) / b for a, b in zip(losses(again), losses(tmp_path))) <= 1e-12


def factor_after(values: dict[str, Any]) -> float:
    """Trains to the end; the factor of the branches then."""
    with build_trainer(build_config(values), RankInfo()) as trainer:
        trainer.train()
        warm = trainer.model.model.warm
    assert warm is not None
    return warm.item()


def test_the_factor_follows_the_step(tmp_path: Path) -> None:
    """Catches a trainer that does not tell the step, or counts it from 0, and a factor beyond 1."""
    make_tokens(tmp_path / "tokens")
    for period, expected in ((8, 6 / 8), (4, 1.0)):
        values = settings(tmp_path, model__residual="branchnorm", model__branchnorm_period=period, run__dir=str(tmp_path / str(period)))
        assert run_ranks(1, factor_after, values) == [expected]


def other_depth(values: dict[str, Any], stop_at: int) -> tuple[int, str]:
    """A run whose coefficients are twice those of the table, as if its layers came from a model of another depth."""
    table = decoder.residual

    def doubled(*args: Any) -> Any:
        row = table(*args)
        return replace(row, skip=2 * row.skip, branch=row.branch if row.branch == 1 else 2 * row.branch)

    decoder.residual = doubled
    return run(values, stop_at)


@pytest.mark.parametrize("name", ["deepnorm", "deepscale"])
def test_coefficients_belong_to_checkpoints(tmp_path: Path, name: str) -> None:
    """Catches coefficients that a resume computes anew, and a checkpoint with others that is taken without a word."""
    make_tokens(tmp_path / "tokens")
    values = settings(tmp_path, model__residual=name)
    assert {c for c, _ in run_ranks(2, other_depth, values, 3)} == {75}
    kept = weights_at(tmp_path, 3)["model.blocks.1.skip"]
    code, message = run_ranks(1, run, values)[0]
    assert code == 2 and "blocks.0.skip is" in message
    assert f"is {kept[0].item():.6f} in" in message and f"gives {kept[0].item() / 2:.6f}" in message, message
    assert run_ranks(1, run, {**values, "run": {**values["run"], "allow_change": ["model.residual"]}})[0][0] == 0
    assert torch.equal(weights_at(tmp_path, 6)["model.blocks.1.skip"], kept)
