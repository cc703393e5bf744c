"""Idle time and live activations of each pipeline schedule in closed form, equal to the simulated orders (`schedule/timeline.py`); a test
holds them so. The orders themselves are torch's, and planning imports no torch.
"""

from __future__ import annotations

from megascale.config.stages import SPLIT_BACKWARD


def idle_units(schedule: str, ranks: int, virtual: int, micro_batches: int) -> float:
    """Time in which a rank waits, in forwards of one stage, if a backward takes two: its gradients of inputs and of weights one each."""
    p, v, m = ranks, virtual, micro_batches
    if schedule in ("zbv", "dualpipev"):
        return max(p - 1, 4 * p - 2 - 2 * m)
    if schedule in SPLIT_BACKWARD:
        return p - 1 if m >= p else 2 * p * v + 2 * m - 1 + (v - 1) * max(0, 2 * m - p) - 3 * m * v
    # With fewer micro-batches than ranks the first one has not come back when the last one has left.
    return max(3 * (p - 1), 3 * p * v + 3 * (m - 1) - 3 * m * v)


def live_forwards(schedule: str, ranks: int, virtual: int, micro_batches: int) -> list[int]:
    """By rank, the most forwards of a stage whose backward has not run yet."""
    p, v, m = ranks, virtual, micro_batches
    match schedule:
        case "gpipe" | "looped_bfs":
            return [m * v] * p
        case "1f1b":
            return [min(m, p - r) for r in range(p)]
        case "interleaved_1f1b":
            size = m // max(1, m // p)  # micro-batches of a round
            return [min(m * v, (v - 1) * size + 2 * (p - 1 - r) + 1) for r in range(p)]
        case "zbv":
            return [min(2 * p, 2 * m, m + 1 + r) for r in range(p)]
        case "dualpipev":
            return [2 * p + 1] * p
    return [min(m * v, (v - 1) * (m // max(1, m // p)) + p)] * p


def live_of_stages(schedule: str, ranks: int, virtual: int, micro_batches: int, rank: int) -> list[int]:
    """A rank's `live_forwards` by its stages. In a V the first stage waits for the way there and back; interleaved stages take turns of a
    round's micro-batches, so that the first ones are ahead.
    """
    whole = live_forwards(schedule, ranks, virtual, micro_batches)[rank]
    if schedule in ("zbv", "dualpipev"):
        back = min(rank + 1, micro_batches, whole)
        return [whole - back, back]
    turns, size = [0] * virtual, max(1, micro_batches // max(1, micro_batches // ranks))
    if schedule in ("gpipe", "looped_bfs"):
        size = micro_batches
    for i in range(whole):
        turns[i // size % virtual] += 1
    return turns


def sends(ranks: int, schedule: str, virtual: int, micro_batches: int, rank: int) -> int:
    """Messages of activations and gradients that a rank sends in a step: one for each micro-batch, direction, and border of its stages to
    another rank's. The two stages at the turn of a V are on one rank.
    """
    p, v, m = ranks, virtual, micro_batches
    if schedule in ("zbv", "dualpipev"):
        return m * 2 * (1 if rank in (0, p - 1) else 2)
    borders = 2 * v - (rank == 0) - (rank == p - 1)
    return m * borders
