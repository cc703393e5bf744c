"""Angles and masks are made once for a micro-batch, whatever number of stages it passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megascale.config.schema import Parallel
from megascale.model.decoder import Decoder
from megascale.model.remembered import MOST, Remembered
from tests.layouts import Case, tiny, train


def test_results_live_as_long_as_their_source() -> None:
    """Catches a result that is made for every layer, one of another micro-batch, and results that pile up."""
    made, kept, source = [], Remembered(), torch.zeros(2)
    for _ in range(2):
        for given, name in ((None, "a"), (source, "a"), (source, "b")):
            kept.of(given, name, lambda given=given, name=name: made.append((given is None, name)))  # type: ignore[misc]
    assert made == [(True, "a"), (False, "a"), (False, "b")]
    other = torch.zeros(2)
    found = kept.of(other, "a", lambda: 5)
    del other
    assert found == 5 and len(kept.by_batch) == 1
    del source, given
    assert len(kept.by_batch) == 0
    for n in range(3 * MOST):
        kept.of(None, n, lambda n=n: n)  # type: ignore[misc]
    assert len(kept.always) == MOST and kept.of(None, 3 * MOST - 1, lambda: -1) == 3 * MOST - 1
    with torch.inference_mode():
        assert kept.of(None, "inference", lambda: 1) == 1 and kept.of(None, "inference", lambda: 2) == 2


@pytest.mark.parametrize("packed", [False, True])
def test_angles_are_made_once(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches stages of layered accumulation that each make them anew: layers × micro-batches times."""
    calls: list[int] = []
    real = Decoder.angles

    def counted(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(Decoder, "angles", counted)
    case = Case(tiny(num_layers=3), Parallel(accumulation="layered"), packed=packed, batch=4, steps=2, keep_tensors=False)
    train(case)
    assert len(calls) == (8 if packed else 1)
