"""What torch.compile takes of a block: one graph, exchanges between ranks and recomputation inside it, in every layout that can be so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.graphs import LAYOUTS, MODES, RESULTS, case, coverage, table
from megascale.comm.functional import counting_backend
from megascale.config.schema import Parallel
from megascale.model.deferred import KEEPS_MEMORY, defer
from megascale.model.layers import Linear
from megascale.model.ops.compiled import compile_static, left_out
from tests.layouts import Case, tiny, train, worst
from tests.ranks import run_ranks
from tests.test_layouts import single

pytestmark = pytest.mark.dist
MODEL = tiny(num_layers=2, num_heads=4, num_kv_heads=2)
SOME = {"tp, tp_sequence": "full", "cp ulysses": "selective", "cp ring": "full", "pp zbv": "selective"}
ONE_GRAPH = ("dense, fsdp", "ddp", "tp", "tp, tp_sequence", "cp ulysses", "cp ring", "pp 1f1b", "pp zbv")


@pytest.mark.parametrize(
    "rows",
    [list(SOME.items()), pytest.param([(name, mode) for name in ONE_GRAPH for mode in MODES], marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_blocks_are_one_graph(rows: list[tuple[str, str]]) -> None:
    """Catches an exchange that breaks the graph of a block, and recomputation around a break: then the whole block ran eager, silently."""
    cases = {f"{name}, {mode}": case(LAYOUTS[name], mode) for name, mode in rows}
    for name, found in run_ranks(2, coverage, cases, 2, timeout=600)[0].items():
        assert (found.breaks, found.eager_products) == (0, 0), (name, found.reasons)
        # One for all blocks, one more where the first has its input in another order, one for the loss.
        assert found.graphs <= 3, name


def test_the_table_is_what_was_counted() -> None:
    """Catches a cell of docs/gpu.md that nobody counted, and a count that the page does not show."""
    page = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text()
    assert table(json.loads(RESULTS.read_text())["coverage"]) in page


MIXTURES = [name for name in LAYOUTS if name.startswith("experts")]


@pytest.mark.parametrize(
    ("name", "modes"),
    [("experts, ep", ["selective", "full"]), *(pytest.param(name, MODES, marks=pytest.mark.slow) for name in MIXTURES)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_mixture_is_one_graph(name: str, modes: list[str]) -> None:
    """Catches a break at the rows that experts receive, or at the gather of their weights, and a new graph whenever their number changes:
    eight micro-batches run, with other rows each.
    """
    ranks = LAYOUTS[name].get("ranks", 2)
    for mode, found in run_ranks(ranks, coverage, {mode: case(LAYOUTS[name], mode) for mode in modes}, ranks, timeout=600)[0].items():
        assert (found.graphs, found.breaks, found.eager_products) == (2, 0, 0), (mode, found.reasons)


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


class Two(torch.nn.Module):
    """Two products, the second's gradient as large as other results of the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (Linear(8, 8, "up", 0, 1.0, torch.float64) for _ in range(2))
        for layer in (self.a, self.b):
            layer.weight = torch.nn.Parameter(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x)))


def test_what_a_queue_holds_is_not_overwritten() -> None:
    """Catches inductor reusing the memory of a gradient that a queue holds for the weight pass."""
    x, plain, queue = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), Two(), []  # type: ignore[var-annotated]
    plain(x.requires_grad_()).square().sum().backward()
    both = Two()
    for layer in (both.a, both.b):
        defer(layer, queue)
    torch.compile(both, backend=counting_backend([], KEEPS_MEMORY), dynamic=False)(x).square().sum().backward()
    assert both.a.weight.grad is None and len(queue) == 2
    for add_gradient in queue:
        add_gradient()
    for w, reference in zip(both.parameters(), plain.parameters()):
        assert w.grad is not None and reference.grad is not None
        torch.testing.assert_close(w.grad, reference.grad, rtol=1e-12, atol=1e-12)


class Scaled(torch.nn.Module):
    """Layers of one class whose constants differ, like kinds of blocks."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_many_kinds_are_compiled() -> None:
    """Catches torch's limit of eight graphs for one function: more kinds of layers, or kinds with evaluation and watched FP8, ran eager."""
    torch._dynamo.reset()
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    x = torch.ones(3)
    for n in range(12):
        assert torch.equal(compile_static(Scaled(n + 0.5).forward, backend=backend)(x), x * (n + 0.5))
    assert len(compiled) == 12


def test_what_is_left_to_eager_code_is_said() -> None:
    """Catches a run whose blocks break in the compiler, through a plugin for example, and that nobody hears of."""
    counters: Any = torch._dynamo.utils.counters
    counters.clear()

    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    assert left_out() is None
    torch.compile(broken, backend="eager")(torch.ones(2))
    assert "left parts of the step to eager code" in (left_out() or "")
    counters.clear()
