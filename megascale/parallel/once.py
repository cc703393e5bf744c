"""Expert parallelism in which a token travels once to each rank that has experts of it, whatever their number there.

Where `moe.groups` limits a token's experts to a few groups, and so to few ranks, it has several of them on a rank. A copy of the token
takes the numbers and gates of those along, and the rank returns their weighted sum. So the bytes follow the number of ranks that a token
meets, not that of its experts (node-limited routing: DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megascale.comm.exchange import Flight, exchange_counts, first_rows, on_host
from megascale.comm.mesh import Axis
from megascale.model.experts import Run, load
from megascale.model.ops.grouped_matmul import Permutation, inverse_of


def once(x: Tensor, experts: Tensor, gates: Tensor, num_experts: int, most: int, axis: Axis, handle: Tensor) -> Callable[[Run], Tensor]:
    """Sends tokens x [T, d] to the ranks of their `experts` [T, k], with their `gates` [T, k]; `num_experts` instead of an expert: none.

    most  ranks that a token may meet

    Returns what lets them arrive, runs the experts there and returns the sums [T, d].
    """
    here, ranks = num_experts // axis.size, axis.size
    of = experts // here
    met = torch.zeros((x.shape[0], ranks + 1), dtype=torch.int32, device=x.device).scatter_(1, of, 1)[:, :ranks].topk(most, -1)
    to = met.indices.where(met.values > 0, ranks)  # [T, most], the same rank never twice
    sort, going = Permutation.of(to), load(to, ranks)
    coming = exchange_counts(torch.cat((going.unsqueeze(1), load(experts, num_experts).view(ranks, here)), 1), handle)
    counts = coming[:, 1:].sum(0)
    splits, total = on_host(torch.stack((going, coming[:, 0]))), on_host(counts.sum().view(1, 1))

    token = sort.order // most
    mine = of.index_select(0, token) == to.flatten().index_select(0, sort.order).unsqueeze(1)
    # Numbers among the experts of the rank they go to.
    numbers = (experts.index_select(0, token) % here).where(mine, here).to(torch.uint8 if here < 256 else torch.int32)
    flights = [Flight(part, splits, handle) for part in (sort.permute(x), sort.permute(gates), numbers)]

    def arrive(run: Run) -> Tensor:
        tokens, weights, chosen = (flight.land() for flight in flights)
        own = _rows_of(chosen, total, experts.numel())
        # Products leave the row for assignments to other ranks undefined, and its gradient.
        exists = (torch.arange(own.order.shape[0], device=x.device) < counts.sum()).unsqueeze(1)
        rows = own.permute(tokens)
        results = run(rows.where(exists, rows.new_zeros(())), counts)
        y = own.unpermute(results.where(exists, results.new_zeros(())), weights)
        return sort.sum(Flight(y, splits, handle, True, sort.order.shape[0]).land())

    return arrive


def _rows_of(experts: Tensor, total: Tensor, expected: int) -> Permutation:
    """The assignments of tokens to experts [n, k] here as rows sorted by expert, `total` of them, and a last row for all assignments to
    none if there are some.
    """
    order = experts.flatten().to(torch.int32).argsort(stable=True)
    inverse, order = inverse_of(order), first_rows(order, total, expected)
    return Permutation(order, inverse.clamp(max=order.shape[0] - 1), experts.shape[1])
