"""Plans dynamic sequence parallelism (arXiv 2403.10266): the dimension along which each layer's activation is split. Imports no torch.

An activation [b, S₁ … S_K, d] is split along one dimension at a time, never the one that is attended over. Between two layers the split
may stay, or an all-to-all switches it, in which each of N ranks sends M/N·(N−1)/N bytes of an activation of M bytes. The cheapest
sequence of splits is a shortest path over (layer, split dimension).
"""

from __future__ import annotations

from collections.abc import Sequence


def plan_cuts(attended: Sequence[int], lengths: Sequence[int], ranks: int, costs: Sequence[float] | None = None) -> list[int] | None:
    """The dimension to split at every layer; None if some layer has none of at least `ranks` positions apart from the one it attends over.

    attended  dimension that each layer attends over
    lengths   positions along each dimension
    costs     cost of a switch before each layer, in any unit; by default all equal. The first layer's split is free, since every rank has
              the whole input.

    Among plans of equal cost take the one with the most even parts, then the one that switches latest.
    """
    costs = costs or [1.0] * len(attended)
    idle = [-(-n // ranks) * ranks / n - 1 for n in lengths]  # excess of the longest part over the mean
    best: dict[int, tuple[float, float, list[int]]] = {}
    for layer, over in enumerate(attended):
        allowed = [dim for dim, n in enumerate(lengths) if dim != over and n >= ranks]
        if not allowed:
            return None
        if layer == 0:
            best = {dim: (0.0, idle[dim], [dim]) for dim in allowed}
            continue
        best = {
            dim: min(
                (cost + (costs[layer] if before != dim else 0.0), uneven + idle[dim], [*path, dim])
                for before, (cost, uneven, path) in best.items()
            )
            for dim in allowed
        }
    return min(best.values())[2] if best else []


def describe_plan(attended: Sequence[int], plan: Sequence[int]) -> str:
    """ "0:1 1:0 | 2:0": each layer as attended:split, a bar for each switch."""
    words = []
    for layer, (over, cut) in enumerate(zip(attended, plan)):
        words += ["|"] * (layer > 0 and plan[layer - 1] != cut) + [f"{over}:{cut}"]
    return " ".join(words)
