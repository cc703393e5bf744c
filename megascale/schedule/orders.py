"""Pipeline schedules as data: for every rank the order of (stage, micro-batch, direction). No devices, no processes.

The complex orders are torch's own (`torch.distributed.pipelining.schedules`); GPipe and 1F1B are written here because torch's versions have
their own runtime and restrict the number of micro-batches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch.distributed.pipelining import schedules as engine

from megascale.config.stages import stages_of_rank

KINDS = {"F": engine._ComputationType.FORWARD, "B": engine._ComputationType.FULL_BACKWARD}
WEIGHTS = {"UNSHARD": "G", "RESHARD": "U", "REDUCE_GRAD": "R"}
Order = dict[int, list[Any]]  # rank → torch's actions, or steps; None is idle


@dataclass(frozen=True)
class Action:
    """One computation. kind: F forward, B full backward, I gradient of the input only, W gradients of the weights.

    Or an exchange of a stage's weights, without a micro-batch (−1): G starts gathering them, R makes the next backward reduce their
    gradients, U frees them again.
    """

    kind: str
    stage: int
    micro_batch: int


def compute_order(schedule: str, ranks: int, virtual: int, micro_batches: int, pairs: bool = False) -> Order:
    """The computations of every rank in order, as torch's actions. `pairs`: those that DualPipeV overlaps stay together."""
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
    # torch computes an order while it builds a schedule, only from these facts of its stages.
    own = stages_of_rank(schedule, ranks, virtual, 0)
    total = ranks * len(own)
    stand_ins: Any = [
        SimpleNamespace(
            num_stages=total, group_size=ranks, group_rank=0, stage_index=i, is_first=i == 0, is_last=i == total - 1, submod=None
        )
        for i in own
    ]
    order = kind(stand_ins, micro_batches, loss_fn=_no_loss, scale_grads=False).pipeline_order
    if pairs:
        return order
    return {rank: [a for action in actions for a in _apart(action)] for rank, actions in order.items()}


def forward_order(schedule: str, ranks: int, virtual: int, micro_batches: int) -> Order:
    """Evaluation: every stage takes all micro-batches, one stage after the other."""
    return {r: _breadth_first(schedule, ranks, virtual, micro_batches, r, backward=False) for r in range(ranks)}


def layered_order(stages: int, micro_batches: int, breadth: int) -> list[Action]:
    """Layered accumulation on one rank (Lamy-Poirier, arXiv 2106.02679): each stage takes `breadth` micro-batches before the next stage
    starts, so that its weights are gathered once per direction and its gradients reduced once, for all of them.

    The first stage is the embedding, whose backward needs no weights; the last is the head, where each micro-batch turns around at once.
    The stage before the head stays gathered from forward to backward. In backward, micro-batches run in reverse order, so that the last one
    stored is needed first. The next stage is gathered while the current one computes.
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
    """A rank's computations without idle steps, for drawing and for comparison with the real run."""
    return [s for s in as_steps(actions) if s.micro_batch >= 0]


def as_steps(actions: list[Any]) -> list[Action]:
    """Torch's actions (or steps already) as steps: computations and exchanges of weights, without messages and idle steps."""
    return [step for action in actions if (step := _as_step(action)) is not None]


def _as_step(action: Any) -> Action | None:
    if isinstance(action, Action):
        return action
    kind = "" if action is None else action.computation_type.value
    if kind in WEIGHTS:
        return Action(WEIGHTS[kind], action.stage_index, -1)
    return Action(kind, action.stage_index, action.microbatch_index) if kind in ("F", "B", "I", "W") else None


def with_weights(order: Order, micro_batches: int, every: int | None = None) -> Order:
    """An order of computations with the exchanges of weights that torch's runtime inserts for FSDP2's stages, and reductions after `every`
    so many backward passes of a stage.
    """
    whole = {r: engine._add_reduce_grad([*engine._add_unshard_reshard(actions)], micro_batches) for r, actions in order.items()}
    return whole if every is None else {r: _reduced_early(actions, micro_batches, every) for r, actions in whole.items()}


def _reduced_early(actions: list[Any], micro_batches: int, every: int) -> list[Any]:
    found: list[Any] = []
    done: Counter[int] = Counter()
    for action in actions:
        found.append(action)
        step = _as_step(action)
        if step is not None and step.kind == "B":
            done[step.stage] += 1
            if done[step.stage] % every == 0 and done[step.stage] < micro_batches:
                found.append(Action("R", step.stage, -1))
    return found


def _apart(action: Any) -> list[Any]:
    """Splits DualPipeV's pairs of a forward and a backward into two actions. torch's runtime does not overlap a pair: it runs both one
    after the other once both messages have arrived, which doubles the idle time.
    """
    return list(action.sub_actions) if action is not None and action.sub_actions else [action]


def _breadth_first(schedule: str, ranks: int, virtual: int, m: int, rank: int, backward: bool) -> list[Any]:
    own = stages_of_rank(schedule, ranks, virtual, rank)
    actions = [engine._Action(s, KINDS["F"], i) for s in own for i in range(m)]
    if backward:
        # Backward keeps the order of micro-batches: the previous stage needs the gradient of the first one first.
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
