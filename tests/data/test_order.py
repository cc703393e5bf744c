"""The order of samples: bijective, exact in its weights, a function of (seed, number) alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.data.loader import sample_numbers
from megascale.data.order import BLOCK, permute, plan_mixture, split_documents
from megascale.errors import UsageError


@given(st.integers(1, 700), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    """Catches a sample that is seen twice in an epoch, or never."""
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


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


@given(st.integers(0, 50), st.floats(0, 0.9))
@settings(deadline=None)
def test_split_is_a_partition(count: int, fraction: float) -> None:
    """Catches documents that are in both parts, and an empty validation part that was asked for."""
    train, valid = split_documents(count, fraction)
    assert sorted([*train, *valid]) == list(range(count))
    if fraction > 0 and count >= 2:
        assert len(valid) > 0 and len(train) > 0


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 5))
@settings(deadline=None)
def test_ranks_share_a_batch_exactly(count: int, micro: int, parts: int) -> None:
    """Catches samples that two ranks train on, or none; every rank has the same number of micro-batches."""
    rows = [sample_numbers(100, count, micro, p, parts) for p in range(parts)]
    assert len({len(r) for r in rows}) == 1
    seen = [n for r in rows for row in r for n in row if n >= 0]
    assert sorted(seen) == list(range(100, 100 + count))
