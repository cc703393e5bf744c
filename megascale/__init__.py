"""megascale from Python: `import megascale as ms` (docs/python.md). Names are imported on first use, and torch with them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megascale.version import __version__ as __version__

if TYPE_CHECKING:
    from megascale.api import convert, dry_run, generate, grow, load_config, load_model, plan, training
    from megascale.errors import MegascaleError, OutOfMemoryError, PeerLostError, StopRequested, TrainingError, UsageError

__all__ = [
    "MegascaleError",
    "OutOfMemoryError",
    "PeerLostError",
    "StopRequested",
    "TrainingError",
    "UsageError",
    "convert",
    "dry_run",
    "generate",
    "grow",
    "load_config",
    "load_model",
    "plan",
    "training",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'megascale' has no attribute {name!r}")
    return getattr(import_module("megascale.errors" if name[0].isupper() else "megascale.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
