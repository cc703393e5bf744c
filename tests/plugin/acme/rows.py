"""Rows for megascale. No torch here: what needs it is named as "module:name"."""

from __future__ import annotations

import math

from megascale.config.decays import DecayRow, between, done
from megascale.config.optimizers import OptimizerRow
from megascale.data.forms import Reader
from megascale.train.log.step_metrics import StepMetric

ROWS = {
    "optimizers": {
        # Steps of ±lr along the sign of a momentum (Signum, arXiv 1802.04434); growth scales a mean of gradients by its first power.
        "signum": OptimizerRow("acme.optim:Signum", state={"velocity": 1}, scale_free=True),
        # Says nothing of its state, so that growth refuses it.
        "heavyball": OptimizerRow("acme.optim:HeavyBall", state={"velocity": None}),
    },
    "decays": {"sqrt": DecayRow(lambda optim, step, steps: between(optim, 1 - math.sqrt(done(optim, step, steps))), "end")},
    "metrics": {"bits_per_token": StepMetric(lambda s: s.loss / math.log(2))},
    "readers": {"wet": Reader("acme.reading:wet", endings=(".wet",))},
}
