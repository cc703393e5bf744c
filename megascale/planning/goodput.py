"""How much of a job's time becomes training, given failures and checkpoints. Imports no torch.

A rank keeps τ seconds of work between saves that stop it for δ; failures come at rate 1/M and cost R until the next attempt trains. The
expected time of one such interval is M·e^(R/M)·(e^((τ+δ)/M) − 1) (Daly, 2006, equation 20), whose best τ has a closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megascale.errors import UsageError

COPY = 10e9  # bytes per second from a device to its host: what an asynchronous save stops training for


@dataclass(frozen=True)
class Goodput:
    """The share of time that is training, at the best interval between checkpoints."""

    share: float
    interval: float
    mean_seconds_to_failure: float
    save_seconds: float
    written_seconds: float


def best_interval(save: float, failure: float) -> float:
    """Seconds of work between saves for the least expected time: the root of e^((τ+δ)/M)·(1 − τ/M) = 1."""
    if math.isinf(failure):
        return math.inf
    low, high = 0.0, failure
    for _ in range(200):
        middle = (low + high) / 2
        # The logarithm is positive before the root: at τ = 0 it is δ/M, and at τ = M it is −∞.
        before = middle < failure and (middle + save) / failure + math.log1p(-middle / failure) > 0
        low, high = (middle, high) if before else (low, middle)
    return (low + high) / 2


def share_at(interval: float, save: float, failure: float, restart: float) -> float:
    """Training time ÷ expected time, with saves every `interval` seconds of work."""
    if math.isinf(failure):
        return 1.0 if math.isinf(interval) else interval / (interval + save)
    exponent = (interval + save) / failure
    if exponent > 500:
        return 0.0
    return interval / failure * math.exp(-restart / failure) / math.expm1(exponent)


def goodput(ranks: int, failures_per_gpu_hour: float, held: float, total: float, write_rate: float, restart: float) -> Goodput:
    """A save copies the `held` bytes of each rank to its host, and is of use once the `total` of the model is written."""
    failure = math.inf if not failures_per_gpu_hour else 3600.0 / (failures_per_gpu_hour * ranks)
    save = max(held / COPY, 1e-3)
    written = total / write_rate
    interval = max(best_interval(save, failure), written)
    share = share_at(interval, save, failure, restart + written)
    if share < 1e-6:
        raise UsageError(f"a failure every {failure:.3g} s leaves no time to train: check failures_per_gpu_hour and restart_seconds")
    return Goodput(share, interval, failure, save, written)
