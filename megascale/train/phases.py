"""The parts of a run between growths, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megascale.config.schema import Config, GrowAt


@dataclass(frozen=True)
class Phase:
    """`config` of the model as it is then, `whole` as the run was begun; its last step `until`, the growth after it (None: the run ends),
    and the grown checkpoint `origin` that begins it (None: the run's beginning).
    """

    config: Config
    whole: Config
    until: int
    growth: GrowAt | None = None
    origin: Path | None = None
