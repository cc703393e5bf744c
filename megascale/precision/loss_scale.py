"""The static loss scale of FP8: scales gradients that would vanish in e5m2 into its range."""

from __future__ import annotations

import math

from megascale.config.schema import Config

HEADROOM = 2**6


def loss_scale(config: Config) -> float:
    """A power of two that depends only on shapes.

    A mean cross-entropy over T tokens and a head that divides by d give the last hidden state a gradient of about 1/(d·T), while e5m2's
    smallest number is 1.5e-5; times d·T it is about 1. The headroom leaves room below, since gradients shrink while a model learns, and
    2¹⁵ ÷ 2⁶ above.
    """
    if config.precision.fp8 != "static":
        return 1.0
    if config.precision.loss_scale is not None:
        return config.precision.loss_scale
    places = config.train.global_batch_size * config.train.seq_len
    return float(HEADROOM * 2 ** math.ceil(math.log2(config.model.hidden_size * places)))
