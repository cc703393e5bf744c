"""Pipeline schedules as data: for every rank the order in which it runs (stage, micro-batch, direction). No devices, no processes.

The involved orders are torch's own (`torch.distributed.pipelining.schedules`); GPipe and 1F1B are written here because torch's versions of
them carry a runtime of their own and restrict the number of micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch.distributed.pipelining import schedules as engine

from megascale.config.stages import stages_of_rank

KINDS = {"F": engine._ComputationType.FORWARD, "B": engine._ComputationType.FULL_BACKWARD}
Order = dict[int, list[Any]]  # rank → torch's actions; None is a step of waiting


@dataclass(frozen=True)
class Step:
    """One computation. kind: F forward, B full backward, I gradient of the input only, W gradients of the weights."""

    kind: str
    stage: int
    micro_batch: int


def compute_order(schedule: str, ranks: int, virtual: int, micro_batches: int) -> Order:
    """The computations of every rank in order, as torch's actions."""
    match schedule:
        case "gpipe" | "looped_bfs":
            return {r: _breadth_first(schedule, ranks, virtual, micro_batches, r, backward=True) for r in range(ranks)}
        case "1f1b":
            return {r: _one_forward_one_backward(ranks, micro_batches, r) for r in range(ranks)}
    kind = {
        "interleaved_1f1b": engine.ScheduleInterleaved1F1B,
        "interleaved_zero_bubble": engine.ScheduleInterleavedZeroBubble,
        "zbv": engine.ScheduleZBVZeroBubble,
        "dualpipev": engine.ScheduleDualPipeV,
    }[schedule]
    # torch writes an order while it builds a schedule, from these facts of its stages alone.
    own = stages_of_rank(schedule, ranks, virtual, 0)
    total = ranks * len(own)
    stand_ins: Any = [
        SimpleNamespace(
            num_stages=total, group_size=ranks, group_rank=0, stage_index=i, is_first=i == 0, is_last=i == total - 1, submod=None
        )
        for i in own
    ]
    order = kind(stand_ins, micro_batches, loss_fn=_no_loss, scale_grads=False).pipeline_order
    return {rank: [a for action in actions for a in _apart(action)] for rank, actions in order.items()}


def forward_order(schedule: str, ranks: int, virtual: int, micro_batches: int) -> Order:
    """Evaluation: every stage takes all micro-batches, one stage after the other."""
    return {r: _breadth_first(schedule, ranks, virtual, micro_batches, r, backward=False) for r in range(ranks)}


def steps(actions: list[Any]) -> list[Step]:
    """A rank's computations without waiting: what is drawn and what is compared with what ran."""
    found = [a for a in actions if a is not None and a.computation_type.value in "FBIW"]
    return [Step(a.computation_type.value, a.stage_index, a.microbatch_index) for a in found]


def splits_backward(order: Order) -> bool:
    """Whether weight gradients are computed apart from input gradients."""
    return any(s.kind == "W" for actions in order.values() for s in steps(actions))


def _apart(action: Any) -> list[Any]:
    """DualPipeV's pairs of a forward and a backward as two actions. torch's runtime does not overlap a pair: it runs the two one after the
    other once the messages of both are there, which doubles the idle time.
    """
    return list(action.sub_actions) if action is not None and action.sub_actions else [action]


def _breadth_first(schedule: str, ranks: int, virtual: int, m: int, rank: int, backward: bool) -> list[Any]:
    own = stages_of_rank(schedule, ranks, virtual, rank)
    actions = [engine._Action(s, KINDS["F"], i) for s in own for i in range(m)]
    if backward:
        # The same order of micro-batches on the way back: the first one forward is the first one whose gradient the stage before needs.
        actions += [engine._Action(s, KINDS["B"], i) for s in reversed(own) for i in range(m)]
    return actions


def _one_forward_one_backward(ranks: int, m: int, rank: int) -> list[Any]:
    ahead = min(m, ranks - 1 - rank)
    forwards = [engine._Action(rank, KINDS["F"], i) for i in range(m)]
    backwards = [engine._Action(rank, KINDS["B"], i) for i in range(m)]
    actions = forwards[:ahead]
    for i in range(m):
        actions += [*forwards[ahead + i : ahead + i + 1], backwards[i]]
    return actions


def _no_loss(*_: Any) -> None: ...
