"""Exchanges of tensor parallelism copy no tensor that they need not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.config.schema import Parallel
from tests.layouts import Case, build, fake_batch, tiny
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist
aten = torch.ops.aten
COPYING = (aten.clone.default, aten.cat.default)  # gloo copies, too, by copy_


class Copies(TorchDispatchMode):
    """Counts the copies of tensors that are at least half as large as the stream here."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.seen = least, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in COPYING and out.ndim >= 2 and out.numel() >= self.least:
            self.seen[func.name()] += 1
        return out


def copies(case: Case) -> int:
    model, b = build(case, 2), fake_batch(case, [0] * case.micro_batch)
    with Copies(case.micro_batch * case.seq_len * case.model.hidden_size // 2) as found:
        model.module(b.tokens, b.targets, None, None, b.samples).backward()
    return found.seen.total()


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("sequence", [False, True])
def test_exchanges_copy_once_at_most(sequence: bool, micro_batch: int) -> None:
    """Catches a product copied before it is summed in place, and a stream that leaves a gather transposed, so that each of the products
    after it copies it. Cutting several sequences takes one copy for each exchange; the gradient of the head's input is a view, copied
    before it is summed.
    """
    layers = 3
    model = tiny(num_layers=layers, num_kv_heads=4)
    alone = copies(Case(model, Parallel(), micro_batch=micro_batch))
    for found in run_ranks(2, copies, Case(model, Parallel(tp=2, tp_sequence=sequence), micro_batch=micro_batch)):
        exchanges = 2 * (2 * (2 * layers) + 2)  # two a sublayer, one at each end, and their mirrors in backward
        assert found - alone == ((exchanges if micro_batch > 1 else 0) if sequence else 1)
