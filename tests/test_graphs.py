"""What torch.compile takes of a block: one graph, exchanges between ranks and recomputation inside it, in every layout that can be so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megascale.analysis.compiled_graphs import counted_graphs
from megascale.config.schema import Parallel
from megascale.parallel import apply
from megascale.train.build import build_schedule
from tests.layouts import Case, build, fake_batch, tiny, train, worst
from tests.ranks import run_ranks
from tests.test_layouts import single

pytestmark = pytest.mark.dist
MODEL = tiny(num_layers=2, num_heads=4, num_kv_heads=2)
EXPERTS = {"num_experts": 4, "top_k": 2, "ffn_size": 32}
MIXTURE = tiny(num_layers=2, num_heads=4, num_kv_heads=2, moe=EXPERTS)
Row = tuple[int, int, int]  # graphs, breaks, eager products of a step


def coverage(cases: dict[str, Case], ranks: int) -> dict[str, Row]:
    """Of each case, one after the other on these ranks. Graphs are made and not compiled: nothing but their number is asked."""
    apply.counting_backend = lambda axes: "aot_eager"  # type: ignore[assignment]
    found: dict[str, Row] = {}
    for name, case in cases.items():
        with counted_graphs() as counted:
            model = build(case, ranks)
            if ranks == 1:
                for stage in model.stages:
                    stage.exchanges.loss_backend = "aot_eager"
            schedule = build_schedule(model, case.parallel, torch.device("cpu"))
            for _ in range(2):
                counted.eager_products = 0
                schedule.run([fake_batch(case, [i]) for i in range(2)], 1.0)
        found[name] = counted.graphs, counted.breaks, counted.eager_products
    return found


def cases(rows: dict[str, dict[str, Any]], **model: Any) -> dict[str, Case]:
    cfg = MIXTURE if model.get("moe") else MODEL
    return {n: Case(cfg, Parallel(compile=True, **row), precision="fp32", seq_len=32, batch=4, micro_batch=1) for n, row in rows.items()}


TWO_RANKS: dict[str, dict[str, Any]] = {
    "tp": {"tp": 2, "recompute": "selective"},
    "tp_sequence": {"tp": 2, "tp_sequence": True, "recompute": "full"},
    "ulysses": {"cp": 2, "cp_method": "ulysses", "recompute": "selective"},
    "ring": {"cp": 2, "recompute": "full"},
    "fsdp": {"dp_shard": 2, "recompute": "nested"},
}
MORE_OF_THEM: dict[str, dict[str, Any]] = {
    f"{name} {mode}": {**row, "recompute": mode} for name, row in TWO_RANKS.items() for mode in ("none", "selective", "full", "nested")
} | {"pp": {"pp": 2, "recompute": "selective"}, "ddp": {"engine": "ddp", "dp_replicate": 2, "recompute": "full"}}


@pytest.mark.parametrize("rows", [TWO_RANKS, pytest.param(MORE_OF_THEM, marks=pytest.mark.slow)], ids=["some", "all"])
def test_blocks_are_one_graph(rows: dict[str, dict[str, Any]]) -> None:
    """Catches an exchange that breaks the graph of a block, and recomputation around a break: then the whole block ran eager, silently."""
    for name, (graphs, breaks, eager) in run_ranks(2, coverage, cases(rows), 2, timeout=600)[0].items():
        assert (breaks, eager) == (0, 0), name
        assert graphs <= 3, f"{name}: one graph for all blocks, one more where the first has its input in another order, one for the loss"


@pytest.mark.parametrize("mode", ["selective", pytest.param("full", marks=pytest.mark.slow)])
def test_a_mixture_is_compiled_around_its_rows(mode: str) -> None:
    """Catches recomputation that leaves attention and norms beside a mixture of experts eager."""
    found = run_ranks(1, coverage, cases({mode: {"recompute": mode}}, moe=True), 1, timeout=300)[0]
    graphs, breaks, eager = found[mode]
    assert eager == 0 and breaks > 0 and graphs > 1


@pytest.mark.parametrize(
    "row",
    [
        {"tp": 2, "recompute": "none"},
        pytest.param({"tp": 2, "tp_sequence": True, "recompute": "full"}, marks=pytest.mark.slow),
        pytest.param({"cp": 2, "cp_method": "ulysses", "recompute": "full"}, marks=pytest.mark.slow),
        pytest.param({"cp": 2, "recompute": "selective"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_graph_counts_what_it_sends(row: dict[str, Any]) -> None:
    """Catches bytes of exchanges inside a graph that nobody counts, and another result."""
    eager, compiled = (Case(MODEL, Parallel(compile=on, **row), precision="fp32", steps=1) for on in (False, True))
    reference, plain, got = single(eager), run_ranks(2, train, eager)[0], run_ranks(2, train, compiled, timeout=300)[0]
    assert (got["sent"], got["calls"]) == (plain["sent"], plain["calls"])
    assert max(abs(a - b) / abs(b) for a, b in zip(got["loss"], reference["loss"])) <= 2e-5
    assert worst(got["grad"], reference["grad"])[0] <= 1e-4
