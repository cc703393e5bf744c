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
WEIGHTS = {"UNSHARD": "G", "RESHARD": "U", "REDUCE_GRAD": "R"}
Order = dict[int, list[Any]]  # rank → torch's actions, or steps; None is a step of waiting


@dataclass(frozen=True)
class Action:
    """One computation. kind: F forward, B full backward, I gradient of the input only, W gradients of the weights.

    Or what happens to a stage's weights, of no micro-batch (−1): G their gathering is started, R the backward that follows reduces their
    gradients, U they are freed again.
    """

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


def layered_order(stages: int, micro_batches: int, breadth: int) -> list[Action]:
    """Layered accumulation on one rank (Lamy-Poirier, arXiv 2106.02679): each stage takes `breadth` micro-batches before the next stage
    starts, so that its weights are gathered once a direction and its gradients reduced once, for all of them.

    The first stage is the embedding, whose backward needs no weights; the last is the head, where each micro-batch turns around at once.
    The stage before the head stays gathered from forward to backward. Going back, micro-batches come in opposite order, so that what was
    put away last is needed first. One stage ahead is gathered while the present one computes.
    """
    order: list[Action] = []
    head = stages - 1
    for start in range(0, micro_batches, breadth):
        group = range(start, min(start + breadth, micro_batches))
        order += _layers_forward(range(head), head, group, keep=head - 1)
        turns = [Action(kind, head, i) for i in group for kind in "FB"]
        order += [*turns[:-1], Action("R", head, -1), turns[-1], Action("U", head, -1)]
        for stage in reversed(range(head)):
            backwards = [Action("B", stage, i) for i in reversed(group)]
            ahead = [Action("G", stage - 1, -1)] if stage > 1 else []
            order += [*ahead, *backwards[:-1], Action("R", stage, -1), backwards[-1], Action("U", stage, -1)]
    return order


def layered_forward_order(stages: int, micro_batches: int) -> list[Action]:
    """Evaluation: all micro-batches through each stage in turn."""
    return _layers_forward(range(stages), stages - 1, range(micro_batches), keep=None)


def _layers_forward(stages: range, last: int, group: range, keep: int | None) -> list[Action]:
    order = [Action("G", stages[0], -1)]
    for stage in stages:
        ahead = [Action("G", stage + 1, -1)] if stage < last else []
        order += [*ahead, *(Action("F", stage, i) for i in group), *([] if stage == keep else [Action("U", stage, -1)])]
    return order


def steps(actions: list[Any]) -> list[Action]:
    """A rank's computations without waiting: what is drawn and what is compared with what ran."""
    return [s for s in as_steps(actions) if s.micro_batch >= 0]


def as_steps(actions: list[Any]) -> list[Action]:
    """Torch's actions (or steps already) as steps: computations, and what happens to weights. Messages and waiting are left out."""
    return [step for action in actions if (step := _as_step(action)) is not None]


def _as_step(action: Any) -> Action | None:
    if isinstance(action, Action):
        return action
    kind = "" if action is None else action.computation_type.value
    if kind in WEIGHTS:
        return Action(WEIGHTS[kind], action.stage_index, -1)
    return Action(kind, action.stage_index, action.microbatch_index) if kind in ("F", "B", "I", "W") else None


def with_weights(order: Order, micro_batches: int) -> Order:
    """An order of computations and, between them, what torch's runtime does to the weights of stages that FSDP2 shards."""
    return {r: engine._add_reduce_grad([*engine._add_unshard_reshard(actions)], micro_batches) for r, actions in order.items()}


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
