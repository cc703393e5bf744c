"""How much of a step is compiled: graphs, breaks, and products that ran eager (docs/gpu.md has the table)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megascale.model import experts, layers

# Every hidden product goes through one of these.
PRODUCTS = ((layers, ("linear", "fp8_linear", "dynamic_linear")), (experts, ("grouped_product", "fp8_grouped")))


@dataclass
class Coverage:
    """Counts in this process. `eager_products`: hidden products outside all graphs; `reasons`: why graphs broke."""

    graphs: int = 0
    breaks: int = 0
    eager_products: int = 0
    reasons: tuple[str, ...] = ()


@contextmanager
def counted_graphs() -> Iterator[Coverage]:
    """Counts what happens inside the block, after resetting the compiler. The numbers are set at its end."""
    import torch._dynamo as dynamo

    dynamo.reset()
    counters: Any = dynamo.utils.counters
    counters.clear()
    coverage, plain = Coverage(), {(module, name): getattr(module, name) for module, names in PRODUCTS for name in names}

    def counting(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any, **more: Any) -> Tensor:
            if not torch.compiler.is_compiling():
                coverage.eager_products += 1
            return product(*args, **more)

        return counted

    for (module, name), product in plain.items():
        setattr(module, name, counting(product))
    try:
        yield coverage
    finally:
        for (module, name), product in plain.items():
            setattr(module, name, product)
        coverage.graphs = counters["stats"].get("unique_graphs", 0)
        coverage.breaks = sum(counters["graph_break"].values())
        coverage.reasons = tuple(reason.splitlines()[0] for reason in counters["graph_break"])
