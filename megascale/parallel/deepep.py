"""Expert parallelism through DeepEP (github.com/deepseek-ai/DeepEP), where it is installed: its kernels send rows over NVLink and RDMA
without NCCL. Two calls are used, `dispatch` and `combine`, each of which is the other's backward pass.

Each assignment of a token to an expert is a row of its own, as everywhere here, so rows for two experts of one rank are sent twice.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megascale.comm.mesh import Axis
from megascale.errors import UsageError
from megascale.model.experts import Arrival, Departure, load
from megascale.model.ops.grouped_matmul import inverse_of, permute


def buffer_class() -> Any:
    """DeepEP's buffer. Raises UsageError where the package is missing."""
    try:
        return importlib.import_module("deep_ep").Buffer
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"parallel.ep_kernels is deepep but this environment has no deep_ep.Buffer ({error}): install DeepEP, or use ep_kernels torch"
        ) from None


def buffer_for(axis: Axis, width: int) -> Any:
    """A buffer for rows of `width` numbers in bf16. Collective."""
    kind = buffer_class()
    sizes = [0, 0]
    for config in (kind.get_dispatch_config(axis.size), kind.get_combine_config(axis.size)):
        hints = config.get_nvl_buffer_size_hint(2 * width, axis.size), config.get_rdma_buffer_size_hint(2 * width, axis.size)
        sizes = [max(a, b) for a, b in zip(sizes, hints)]
    return kind(axis.group, *sizes)


def deepep_dispatch(axis: Axis, width: int) -> Callable[[Tensor], Departure]:
    """A `Dispatch` (model/experts.py) over an axis; the buffer is made at the first exchange."""

    @cache
    def buffer() -> Any:
        return buffer_for(axis, width)

    def dispatch(counts: Tensor) -> Departure:
        return lambda rows: [_arrival(rows, counts, axis, buffer())]

    return dispatch


class _Exchange:
    """One exchange: DeepEP's handle of it, and each received row's local expert."""

    def __init__(self, buffer: Any, axis: Axis) -> None:
        self.buffer, self.axis = buffer, axis
        self.handle: Any = None
        self.experts = torch.empty(0)

    def send(self, rows: Tensor, index: Tensor, num_experts: int) -> Tensor:
        """Rows [n, d] of the experts `index` [n, 1], −1 for none → the rows that come."""
        per_rank, per_rdma_rank, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(index, num_experts)
        self._count(rows)
        received, experts, _, _, self.handle, _ = self.buffer.dispatch(
            rows,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=index,
            topk_weights=torch.ones(index.shape, dtype=torch.float32, device=index.device),
        )
        self.experts = experts
        return received  # type: ignore[no-any-return]

    def send_again(self, rows: Tensor) -> Tensor:
        self._count(rows)
        return self.buffer.dispatch(rows, handle=self.handle)[0]  # type: ignore[no-any-return]

    def send_back(self, rows: Tensor) -> Tensor:
        self._count(rows)
        return self.buffer.combine(rows, self.handle)[0]  # type: ignore[no-any-return]

    def _count(self, rows: Tensor) -> None:
        # Which of them stay here is known on the device only: their mean is counted.
        self.axis.traffic.add(self.axis.name, "all_to_all", rows.nbytes * (self.axis.size - 1) // self.axis.size)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, num_experts: int, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.send(rows, index, num_experts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.exchange.send_back(grads[0].contiguous()), None, None, None


class _SendBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.send_back(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.exchange.send_again(grads[0].contiguous()), None


def _arrival(rows: Tensor, counts: Tensor, axis: Axis, buffer: Any) -> Arrival:
    """Sends rows [n, d], sorted by expert; those beyond the sum of the counts [E] belong to none."""
    ends = counts.cumsum(0)
    index = torch.searchsorted(ends, torch.arange(rows.shape[0], device=rows.device), right=True)
    index = index.where(index < counts.shape[0], -1).unsqueeze(1)
    exchange = _Exchange(buffer, axis)
    received = _Send.apply(rows, index, counts.shape[0], exchange)
    order = exchange.experts.flatten().argsort(stable=True)
    inverse = inverse_of(order)
    here = load(exchange.experts, counts.shape[0] // axis.size)

    def wait() -> tuple[Tensor, Tensor]:
        return permute(received, order, inverse), here

    def back(results: Tensor) -> Tensor:
        return _SendBack.apply(permute(results, inverse, order), exchange)  # type: ignore[no-any-return]

    return Arrival(wait, back)
