"""Rows for megascale. No torch here: what needs it is named as "module:name"."""

from __future__ import annotations

import math
from dataclasses import replace

from megascale.config.activations import ActivationRow
from megascale.config.attentions import GROUPED
from megascale.config.decays import DecayRow, between, done
from megascale.config.norms import NormGrowth, NormRow
from megascale.config.optimizers import OptimizerRow
from megascale.config.positions import PositionRow
from megascale.config.residuals import ResidualScheme
from megascale.config.routers import RouterRow
from megascale.config.schema import Model
from megascale.data.forms import Reader
from megascale.train.log.step_metrics import StepMetric


def gated(m: Model) -> int:
    return GROUPED.weights(m) + m.hidden_size * m.num_heads * m.head_dim


ROWS = {
    "optimizers": {
        # Steps of ±lr along the sign of a momentum (Signum, arXiv 1802.04434); growth scales a mean of gradients by its first power.
        "signum": OptimizerRow("acme.optim:Signum", state={"velocity": 1}, scale_free=True),
        # Says nothing of its state, so that growth refuses it.
        "heavyball": OptimizerRow("acme.optim:HeavyBall", state={"velocity": None}),
    },
    "decays": {"sqrt": DecayRow(lambda optim, step, steps: between(optim, 1 - math.sqrt(done(optim, step, steps))), "end")},
    "metrics": {"bits_per_token": StepMetric(lambda s: s.loss / math.log(2))},
    # It divides by a mean of |x|, so growth makes up by first powers; the other norm says nothing, so that growth refuses it.
    "norms": {"l1norm": NormRow("acme.model:l1_normalized", growth=NormGrowth(1.0)), "silent": NormRow("acme.model:l1_normalized")},
    # E[φ²] and E[φ'²] of a standard normal input (Primer, arXiv 2109.08668).
    "activations": {"relu2": ActivationRow("acme.model:relu_squared", False, 1.5, 2.0, grows=True)},
    "positions": {"nope": PositionRow(grid=True, grows=True)},
    # Grouped attention with a learned gate on what its heads found (arXiv 2505.06708); it says nothing of how it grows.
    "attentions": {"gated": replace(GROUPED, build="acme.model:GatedAttention", weights=gated, growth=None, theory=False, megatron=False)},
    # (x + F(N(x)))/√2, so that the stream keeps its size.
    "residuals": {"halves": ResidualScheme("before", "acme.model:halves")},
    # Says nothing of its gates, so that growth keeps the number of experts.
    "routers": {"softplus": RouterRow("acme.model:by_softplus")},
    "readers": {"wet": Reader("acme.reading:wet", endings=(".wet",))},
}
