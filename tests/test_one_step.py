"""There is one training step and one way to build a model for it: what tests and benchmarks run is what users run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a copy of the step, or of the recipe mesh → stages → parallelize → draw, cannot do without.
PARTS = re.compile(r"^from .* import .*\b(clip_factor|settle_routers|build_stages|parallelize)\b", re.MULTILINE)


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "tools", "launchers"])
def test_nobody_writes_the_step_again(folder: str) -> None:
    """Catches a copy of the training step, of which "equal to one process" would be proven instead of the engine's."""
    copies = [str(p.relative_to(ROOT)) for p in sorted((ROOT / folder).rglob("*.py")) if PARTS.search(p.read_text(encoding="utf-8"))]
    assert not copies
