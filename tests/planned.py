"""The planner's bytes of a case beside those that its ranks counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from megascale.config.support import check
from megascale.planning.setting import setting_of
from megascale.planning.traffic import sent_bytes
from tests.layouts import Case


def assert_planned(case: Case, results: Sequence[Mapping[str, Any]]) -> None:
    """Every axis sends in a step what the planner says. A result may be of fewer ranks than the largest: at most so much then."""
    ranks = len(results)
    config = case.config
    config = config.model_copy(update={"train": config.train.model_copy(update={"source_len": None})})
    planned = sent_bytes(setting_of(check(config, ranks), ranks))
    counted: dict[str, float] = {}
    for result in results:
        for axis, size in result["sent"].items():
            counted[axis] = max(counted.get(axis, 0), size)
    assert {axis: size for axis, size in counted.items() if size} == pytest.approx(planned, rel=1e-9, abs=16)
