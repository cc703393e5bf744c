"""Samples that a changed mixture repeats and skips, compared with the samples that are really drawn."""

from __future__ import annotations

import pytest

from megascale.data import moved as module
from megascale.data import order
from megascale.data.moved import moved, sentence
from megascale.data.order import MixPlan, plan_mixture


def drawn(weights: dict[str, float], first: int, last: int) -> dict[str, set[int]]:
    """By source, the positions of the samples first…last−1, one by one."""
    plan = MixPlan(7, plan_mixture(list(weights.values()), list(weights), 7).quotas)
    found: dict[str, set[int]] = {name: set() for name in weights}
    for sample in range(first, last):
        which, position = plan.locate(sample)
        found[list(weights)[which]].add(position)
    return found


CASES = {
    "other weights": ({"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0}),
    "the same shares": ({"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 6.0}),
    "one more": ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0, "c": 2.0}),
    "from one": ({"a": 1.0}, {"a": 1.0, "b": 1.0}),
    "to one": ({"a": 1.0, "b": 1.0}, {"b": 1.0}),
    "another order": ({"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0}),
}


@pytest.mark.parametrize("samples", [0, 100, 128, 300])
@pytest.mark.parametrize("case", CASES)
def test_the_counts_are_those_of_the_samples(monkeypatch: pytest.MonkeyPatch, case: str, samples: int) -> None:
    """Catches a count that forgets the block that is half drawn, or takes repeated for skipped."""
    for where in (order, module):
        monkeypatch.setattr(where, "BLOCK", 64)
    before, after = CASES[case]
    past, future = drawn(before, 0, samples), drawn(after, samples, samples + 64 * 40)
    seen = {
        name: (len(past.get(name, set()) & future[name]), len(set(range(600)) - future[name] - past.get(name, set()))) for name in after
    }
    found = {m.name: (m.repeated, m.skipped) for m in moved(before, after, 7, samples)}
    assert found == {name: counts for name, counts in seen.items() if counts != (0, 0)}
    if case == "the same shares" or not samples:
        assert not found


def test_the_sentence() -> None:
    """Catches a warning where nothing moves, and one that does not say which source."""
    assert sentence([]) is None
    assert "b: 1,200 samples are seen again and 3 are never seen" in str(sentence([module.Moved("b", 1200, 3)]))
