"""Chooses a layout before anything runs: clusters as data, cost of a step, search, goodput. Imports no torch.

The package has the name of the function `ms.plan`, so once it is imported it answers calls as that function does.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Plan(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> dict[str, Any]:
        from megascale.api import plan

        return plan(*args, **options)


sys.modules[__name__].__class__ = _Plan
