"""Dynamic sequence parallelism as a plan (arXiv 2403.10266): along which dimension an activation is cut at every layer. No torch.

An activation [b, S₁ … S_K, d] is cut along one dimension at a time, and never along the one that is attended over. Between two layers it
may stay as it is, or be switched in one all-to-all that sends M·(N−1)/N² bytes from each of N ranks, M being the bytes of the whole. The
cheapest sequence of cuts is a shortest path over (layer, cut dimension).
"""

from __future__ import annotations

from collections.abc import Sequence


def plan_cuts(attended: Sequence[int], lengths: Sequence[int], ranks: int, costs: Sequence[float] | None = None) -> list[int] | None:
    """The dimension to cut at every layer; None where a layer has none of at least `ranks` positions beside the one it attends over.

    attended  the dimension that each layer attends over
    lengths   positions of each dimension
    costs     of a switch before each layer, in any unit; all the same where absent. Where the first layer's cut lies costs nothing, since
              the input is at hand whole.

    Among plans of equal cost the one with the least uneven parts is taken, then the one that switches latest.
    """
    costs = costs or [1.0] * len(attended)
    idle = [-(-n // ranks) * ranks / n - 1 for n in lengths]  # how much longer the longest part is than the mean
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
    """ "0:1 1:0 | 2:0": layers as attended:cut, a bar for every switch."""
    words = []
    for layer, (over, cut) in enumerate(zip(attended, plan)):
        words += ["|"] * (layer > 0 and plan[layer - 1] != cut) + [f"{over}:{cut}"]
    return " ".join(words)
