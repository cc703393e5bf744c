"""The order of samples: bijective, exact in its weights, a function of (seed, number) alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.data.loader import sample_numbers
from megascale.data.order import BLOCK, permute, permute_many, plan_mixture, split_documents
from megascale.errors import UsageError

FIRST_OF_1000 = [990, 109, 624, 647, 122]
FIRST_HELD_OUT = [83, 88, 97, 100, 115]


@given(st.integers(1, 700), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    """Catches a sample that is seen twice in an epoch, or never."""
    assert sorted(permute_many(np.arange(size), size, key).tolist()) == list(range(size))
    assert permute(size // 2, size, key) == permute_many(np.arange(size), size, key)[size // 2]


def test_permutation_is_fixed() -> None:
    """Catches a change of the order of samples from one version to the next: a resumed run would see some twice."""
    assert [permute(i, 1000, 1, "a", 0) for i in range(5)] == FIRST_OF_1000
    assert 0 <= permute(10**12 - 1, 10**12, 1) < 10**12


def test_permutation_depends_on_every_key_and_shuffles() -> None:
    """Catches epochs or seeds that share an order, and a permutation that is nearly the identity."""
    orders = [[permute(i, 1000, *k) for i in range(1000)] for k in ((1, "a", 0), (1, "a", 1), (2, "a", 0), (1, "b", 0))]
    assert len({tuple(o) for o in orders}) == 4
    assert abs(np.corrcoef(orders[0], range(1000))[0, 1]) < 0.1


def test_mixture_is_exact_in_every_block() -> None:
    """Catches drifting weights and an index that skips or repeats samples of a dataset."""
    plan = plan_mixture([1.0, 2.0, 0.5], ["a", "b", "c"], 3)
    for block in (0, 1):
        places = [plan.locate(block * BLOCK + i) for i in range(BLOCK)]
        counts = Counter(d for d, _ in places)
        assert tuple(counts[d] for d in range(3)) == plan.quotas
        for d, quota in enumerate(plan.quotas):
            assert sorted(i for e, i in places if e == d) == list(range(block * quota, (block + 1) * quota))
    assert plan.quotas == (18725, 37449, 9362)


def test_weight_too_small_to_draw() -> None:
    """Catches a source that is silently never read."""
    with pytest.raises(UsageError, match=r"weight 1e-09 of b"):
        plan_mixture([1.0, 1e-9], ["a", "b"], 0)
    for weight in (float("inf"), float("nan"), -1.0):
        with pytest.raises(UsageError, match="must be positive"):
            plan_mixture([1.0, weight], ["a", "b"], 0)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
@settings(deadline=None, max_examples=50)
def test_quotas_follow_the_weights(weights: list[float]) -> None:
    """Catches rounding that favours some datasets: every quota is within one sample of its exact share, and all add up to the block."""
    quotas = plan_mixture(weights, [str(i) for i in range(len(weights))], 0).quotas
    assert sum(quotas) == BLOCK
    assert all(abs(q - w / sum(weights) * BLOCK) < 1 for q, w in zip(quotas, weights))


@given(st.integers(0, 50), st.floats(0, 0.9))
@settings(deadline=None)
def test_split_is_a_partition(count: int, fraction: float) -> None:
    """Catches documents that are in both parts, and an empty validation part that was asked for."""
    train, valid = split_documents(count, fraction)
    assert sorted([*train, *valid]) == list(range(count))
    if fraction > 0 and count >= 2:
        assert len(valid) > 0 and len(train) > 0
    if fraction == 0:
        assert len(valid) == 0


def test_split_is_fixed_and_has_its_share() -> None:
    """Catches a hash that is biased, or that changes from one version to the next: documents held out would have been trained on."""
    _, valid = split_documents(100_000, 0.05)
    assert abs(len(valid) / 100_000 - 0.05) < 0.003
    assert valid[:5].tolist() == FIRST_HELD_OUT


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 5))
@settings(deadline=None)
def test_ranks_share_a_batch_exactly(count: int, micro: int, parts: int) -> None:
    """Catches samples that two ranks train on, or none; every rank has the same number of micro-batches."""
    rows = [sample_numbers(100, count, micro, p, parts) for p in range(parts)]
    assert len({len(r) for r in rows}) == 1
    seen = [n for r in rows for row in r for n in row if n >= 0]
    assert sorted(seen) == list(range(100, 100 + count))
