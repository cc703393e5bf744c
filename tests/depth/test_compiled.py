"""Compiled blocks under the schemes: one graph for all layers and steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megascale.config.schema import Parallel
from megascale.schedule.accumulate import Accumulation
from tests.depth.test_table import scheme
from tests.layouts import Case, build, fake_batch


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(scheme("branchnorm"), precision="fp32"),
        Case(scheme("deepscale", norm="dyt"), precision="fp32"),
        Case(scheme("subln", linear="bitlinear"), precision="fp32"),
        Case(scheme("parallel", family="encoder"), precision="fp32"),
    ],
    ids=lambda c: c.model.residual,
)
def test_compiled_schemes_equal_eager_ones(case: Case) -> None:
    """Catches a factor of the step that is baked into a graph, and one that makes another graph every step."""
    losses: dict[bool, list[float]] = {}
    for compiled in (False, True):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model = build(replace(case, parallel=Parallel(compile=compiled)), 1)
        losses[compiled], graphs = [], []
        for step in (1, 2, 4):
            model.at_step(step)
            losses[compiled].append(Accumulation(model).run([fake_batch(case, [1])], 1.0).item())
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        # The layers share their graphs, which depend neither on the layer's numbers nor on the step.
        assert not compiled or graphs[0] == graphs[-1] > 0
    # Rounding to integers may turn by one where fused products differ in their last bit.
    assert losses[True] == pytest.approx(losses[False], rel=1e-3 if case.model.linear == "bitlinear" else 1e-5)
    if case.model.residual == "branchnorm":
        assert abs(losses[False][0] - losses[False][-1]) > 1e-3
