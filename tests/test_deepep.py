"""Experts through DeepEP's interface, which a module in plain torch stands in for: the kernels need GPUs."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megascale.config.schema import Parallel
from megascale.errors import UsageError
from megascale.parallel.deepep import buffer_class
from tests.layouts import Case, train, worst
from tests.ranks import run_ranks
from tests.test_experts import MODELS
from tests.test_layouts import single


class Buffer:
    """Rows of equal length through one process group. A token goes once to each rank of its experts; what comes lies by sending rank."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        assert num_nvl_bytes > 0 and num_rdma_bytes >= 0
        self.group, self.ranks = group, group.size()

    @staticmethod
    def get_dispatch_config(ranks: int) -> Any:
        size = lambda nbytes, ranks: nbytes * ranks  # noqa: E731
        return SimpleNamespace(get_nvl_buffer_size_hint=size, get_rdma_buffer_size_hint=lambda *_: 0)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Tensor, None, Tensor, Tensor, None]:
        of_rank = torch.where(topk_idx < 0, -1, topk_idx // (num_experts // self.ranks))
        in_rank = (of_rank[:, :, None] == torch.arange(self.ranks)).any(1)
        per_expert = (topk_idx.flatten()[:, None] == torch.arange(num_experts)).sum(0)
        return in_rank.sum(0).int(), None, per_expert.int(), in_rank, None

    def dispatch(self, x: Tensor, handle: Any = None, **given: Any) -> tuple[Any, ...]:
        if handle is not None:
            in_rank, coming = handle
            return self._out(x, in_rank, coming), None, None, None, None, None
        in_rank, local = given["is_token_in_rank"], len(given["num_tokens_per_expert"]) // self.ranks
        coming = torch.empty(self.ranks, dtype=torch.int32)
        dist.all_to_all_single(coming, given["num_tokens_per_rank"], group=self.group)
        received = self._out(x, in_rank, coming)
        experts = self._out(given["topk_idx"], in_rank, coming) - dist.get_rank(self.group) * local
        assert given["topk_weights"].dtype == torch.float32 and ((experts >= 0) & (experts < local)).all()
        counts = [int((experts == e).sum()) for e in range(local)]
        return received, experts, self._out(given["topk_weights"], in_rank, coming), counts, (in_rank, coming), None

    def combine(self, x: Tensor, handle: Any) -> tuple[Tensor, None, None]:
        in_rank, coming = handle
        sizes = in_rank.sum(0).tolist()
        back = x.new_empty((sum(sizes), x.shape[1]))
        dist.all_to_all_single(back, x, sizes, coming.tolist(), group=self.group)
        total = x.new_zeros((in_rank.shape[0], x.shape[1]))
        for rank, rows in enumerate(back.split(sizes)):
            total[in_rank[:, rank]] += rows
        return total, None, None

    def _out(self, x: Tensor, in_rank: Tensor, coming: Tensor) -> Tensor:
        rows = [x[in_rank[:, rank]] for rank in range(self.ranks)]
        out = x.new_empty((int(coming.sum()), x.shape[1]))
        dist.all_to_all_single(out, torch.cat(rows), coming.tolist(), [len(r) for r in rows], group=self.group)
        return out


def with_stand_in(cases: list[Case]) -> list[dict[str, Any]]:
    module: Any = ModuleType("deep_ep")
    module.Buffer = Buffer
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deep_ep", module)
        return [train(case) for case in cases]


@pytest.mark.dist
def test_experts_through_deepep() -> None:
    """Catches rows that meet another expert or return to another token, dropped rows that count, and a backward pass that is not the
    transpose, also when a block is recomputed.
    """
    rows = {"shared": "none", "capacity": "full", "bias": "selective"}
    cases = [Case(MODELS[name], Parallel(ep=2, ep_kernels="deepep", recompute=mode), steps=2) for name, mode in rows.items()]
    for case, got in zip(cases, run_ranks(2, with_stand_in, cases)[0]):
        wanted = single(replace(case, parallel=Parallel()))
        assert max(abs(a - b) for a, b in zip(got["loss"], wanted["loss"])) <= 1e-12
        assert worst(got["grad"], wanted["grad"])[0] <= 1e-11 and worst(got["weight"], wanted["weight"])[0] <= 1e-11


def test_a_missing_package() -> None:
    """Catches a traceback of the import system."""
    with pytest.raises(UsageError, match=r"parallel\.ep_kernels is deepep but .* install DeepEP, or use ep_kernels torch"):
        buffer_class()
