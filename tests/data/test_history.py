"""Sources keep their place when mixtures and lengths change: compared with what is really drawn, sample by sample."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.data import order
from megascale.data.dataset import Corpus, Mixture
from megascale.data.history import Segment, continue_plan
from megascale.data.indexed import TokenWriter
from megascale.data.order import plan_mixture

NAMES = ("a", "b", "c")
weights = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([1.0, 2.0, 5.0]), min_size=1)


@given(parts=st.lists(st.tuples(weights, st.integers(1, 400)), min_size=1, max_size=5), in_order=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_source_continues_where_it_was(parts: list[tuple[dict[str, float], int]], in_order: bool) -> None:
    """Catches places that depend on other sources' weights: over any mixtures each number of a source is drawn once, and what is left out
    when a block is left half drawn is drawn next.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "BLOCK", 64)
        order._block_in_order.cache_clear()
        past: list[Segment] = []
        seen: dict[str, list[int]] = {name: [] for name in NAMES}
        first = 0
        for mixture, count in parts:
            names = list(mixture)
            segment = Segment(first + count, mixture, 8, 8 if in_order else None)
            plan = continue_plan(plan_mixture(list(mixture.values()), names, 7), names, past, segment.unit)
            for sample in range(first, first + count):
                which, number = plan.locate(sample)
                seen[names[which]].append(number)
            past, first = [*past, segment], first + count
        order._block_in_order.cache_clear()
    for numbers in seen.values():
        assert len(set(numbers)) == len(numbers), "a sample is drawn twice"
        if in_order:
            assert numbers == list(range(len(numbers)))
        else:  # at most what one block of the last mixture has not reached yet is missing below the largest
            assert len(numbers) == 0 or max(numbers) < len(numbers) + 64


def test_a_million_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error that only whole blocks show: a million samples under three mixtures, none twice and none left out below the end."""
    past: list[Segment] = []
    first = 0
    for mixture, end in (({"a": 3.0, "b": 1.0}, 400_001), ({"b": 2.0, "a": 1.0, "c": 1.0}, 700_000), ({"c": 1.0, "a": 7.0}, 1_000_000)):
        past.append(Segment(end, mixture, 8))
        first = end
    names = ["a", "b", "c"]
    plan = continue_plan(plan_mixture([1.0, 1.0, 1.0], names, 7), names, past)
    drawn = [end - start for start, end in ((0, 400_001), (400_001, 700_000), (700_000, 1_000_000))]
    shares = {"a": [3 / 4, 1 / 4, 7 / 8], "b": [1 / 4, 1 / 2, 0], "c": [0, 1 / 4, 1 / 8]}
    for name, left in zip(names, plan.unseen):
        count = left.end - len(left.single)
        assert count == pytest.approx(sum(n * s for n, s in zip(drawn, shares[name])), abs=1500)
        assert len(left.single) < order.BLOCK and np.all(np.diff(left.single) > 0)
    assert sum(left.end - len(left.single) for left in plan.unseen) == first


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    """Two sources in which every token is its own place."""
    folder = tmp_path_factory.mktemp("history")
    found = []
    for name, size in (("a", 12_345), ("b", 7_001)):
        with TokenWriter(folder / name, np.uint16) as writer:
            writer.add(np.arange(size))
        found.append(Corpus(str(folder / name), 1.0, name))
    return found


def mixture(sources: list[Corpus], seq_len: int, chunk: int | None) -> Mixture:
    return Mixture(sources, seq_len, 3, 20_000, "all", 0.0, True, chunk)


@given(parts=st.lists(st.tuples(st.sampled_from([8, 16, 24, 32]), st.integers(1, 300)), min_size=2, max_size=4))
@settings(max_examples=15, deadline=None)
def test_no_token_comes_twice_when_lengths_change(sources: list[Corpus], parts: list[tuple[int, int]]) -> None:
    """Catches windows of another length that overlap those already drawn: within the first epoch no place is a target twice."""
    past: list[Segment] = []
    seen: dict[str, Counter[int]] = {"a": Counter(), "b": Counter()}
    first, left = 0, {"a": 12_344 // 32 * 32, "b": 7_000 // 32 * 32}
    for seq_len, count in parts:
        drawn = mixture(sources, seq_len, 32)
        drawn.continued(past)
        for sample in range(first, first + count):
            which, index = drawn.plan.locate(sample)
            if index >= drawn.windows(drawn.unit, which):
                continue  # of the next epoch
            tokens = drawn.sample(sample)[0]
            seen[sources[which].name].update(tokens[:-1].tolist())
        past, first = [*past, Segment(first + count, {"a": 1.0, "b": 1.0}, seq_len, 32)], first + count
    for name, counter in seen.items():
        assert not counter or max(counter.values()) == 1
        assert sum(counter.values()) <= left[name]


def test_an_epoch_has_every_window(sources: list[Corpus]) -> None:
    """Catches groups at the end of an epoch that lose windows or draw some twice."""
    one = mixture(sources[:1], 16, 32)
    epoch = one.windows(one.unit, 0)
    for start in (0, epoch):
        places = [int(one.sample(start + n)[0][0]) for n in range(epoch)]
        assert sorted(places) == list(range(0, epoch * 16, 16))
    assert one.sample(0)[0][0] != one.sample(epoch)[0][0]


def test_another_length_without_pieces_begins_the_next_epoch(sources: list[Corpus]) -> None:
    """Catches a run that grew longer sequences at a resume and reads at a place that means nothing there."""
    one = mixture(sources[:1], 32, None)
    one.continued([Segment(100, {"a": 1.0}, 16)])
    windows = 12_344 // 32
    assert one.plan.locate(100) == (0, windows)
    one.continued([])
    assert one.plan.locate(0) == (0, 0)


def test_one_order_as_before(tmp_path: Path) -> None:
    """Catches a changed order of runs without phases."""
    plan = plan_mixture([1.0, 2.0], ["a", "b"], 3)
    same = continue_plan(plan, ["a", "b"], [])
    assert [plan.locate(n) for n in range(100)] == [same.locate(n) for n in range(100)]
