"""Simulates a schedule with equally fast stages: when each computation runs, bubble, live activations, sends; and draws it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascale.schedule.orders import Action, Order, as_steps, steps

# In units of a forward. A full backward has two products for each one of forward: gradients of input and weights.
DURATIONS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
COLORS = {"F": "#4c78a8", "B": "#f58518", "I": "#e8a45c", "W": "#54a24b"}
MARKS = {"G": ("^", "#2a7f62", "weights gathered"), "R": ("v", "#b5304f", "gradients reduced")}


@dataclass(frozen=True)
class Span:
    step: Action
    start: float
    end: float


@dataclass(frozen=True)
class Mark:
    """The gathering of a stage's weights (G) starts, or its gradients are ready and reduced (R)."""

    kind: str
    stage: int
    time: float


@dataclass(frozen=True)
class Timeline:
    """lanes: spans by rank. bubble: share of the ranks' time spent waiting. live: by rank, the most forwards whose backward has not run
    yet. sends: by rank, messages of activations and gradients. marks: by rank, exchanges of weights, if the order has them.
    """

    lanes: list[list[Span]]
    bubble: float
    live: list[int]
    sends: list[int]
    marks: list[list[Mark]]


def simulate(order: Order, durations: Mapping[str, float] | Callable[[Action], float] = DURATIONS) -> Timeline:
    """Runs an order in model time, with durations by kind or of each action; messages take no time. Raises ValueError for a deadlock."""
    lasts = durations if callable(durations) else lambda step: durations[step.kind]
    queues = {r: steps(actions) for r, actions in order.items()}
    rank_of = {s.stage: r for r, queue in queues.items() for s in queue}
    stages = len(rank_of)
    done: dict[tuple[str, int, int], float] = {}
    clock, place = dict.fromkeys(queues, 0.0), dict.fromkeys(queues, 0)
    lanes: list[list[Span]] = [[] for _ in queues]
    progress = True
    while progress:
        progress = False
        for r, queue in queues.items():
            while place[r] < len(queue):
                step = queue[place[r]]
                needed = _needs(step, stages)
                if any(n not in done for n in needed):
                    break
                start = max([clock[r], *(done[n] for n in needed)])
                clock[r] = start + lasts(step)
                done[_key(step.kind, step.stage, step.micro_batch)] = clock[r]
                lanes[r].append(Span(step, start, clock[r]))
                place[r] += 1
                progress = True
    stuck = {r: queue[place[r]] for r, queue in queues.items() if place[r] < len(queue)}
    if stuck:
        raise ValueError(f"the order cannot run: every rank waits: {stuck}")
    busy = sum(s.end - s.start for lane in lanes for s in lane)
    whole = max(clock.values()) * len(lanes)
    marks = [_marks(as_steps(order[r]), lane) for r, lane in zip(queues, lanes)]
    return Timeline(lanes, 1.0 - busy / whole, [_live(lane) for lane in lanes], [_sends(lane, rank_of, stages) for lane in lanes], marks)


def text_lanes(timeline: Timeline, width: int = 100) -> list[str]:
    """A line per rank, a column per unit of time: F, B, I, W, and a dot for idle time; truncated to `width` columns."""
    lines = []
    for r, lane in enumerate(timeline.lanes):
        row = ["."] * round(max(s.end for lane in timeline.lanes for s in lane))
        for s in lane:
            row[round(s.start) : round(s.end)] = [s.step.kind] * round(s.end - s.start)
        line = "".join(row)
        lines.append(f"rank {r:<3}{line if len(line) <= width else line[: width - 1] + '…'}")
    return lines


def draw(timeline: Timeline, title: str, path: Path) -> None:
    """Lanes of all ranks as a picture; the name's ending (.png, .svg) decides the format."""
    from matplotlib.figure import Figure  # slow to import, and only a drawing needs it

    lanes = timeline.lanes
    length = max(s.end for lane in lanes for s in lane)
    figure = Figure(figsize=(max(8.0, min(28.0, 0.28 * length)), 1.4 + 0.5 * len(lanes)), layout="constrained")
    axes: Any = figure.subplots()
    chunks = max(len({s.step.stage for s in lane}) for lane in lanes)
    for r, lane in enumerate(lanes):
        own = sorted({s.step.stage for s in lane})
        for s in lane:
            # Later stages of a rank are drawn lighter, to distinguish the loops of a looped schedule.
            alpha = 1.0 - 0.6 * own.index(s.step.stage) / max(1, chunks)
            axes.barh(r, s.end - s.start, 0.86, s.start, color=COLORS[s.step.kind], alpha=alpha, edgecolor="white", linewidth=0.7)
            if length <= 160:
                axes.text((s.start + s.end) / 2, r, str(s.step.micro_batch), ha="center", va="center", fontsize=7, color="black")
        for mark in timeline.marks[r]:
            if mark.kind in MARKS:
                shape, color, _ = MARKS[mark.kind]
                axes.plot(mark.time, r + (0.5 if mark.kind == "G" else -0.5), shape, color=color, markersize=5, clip_on=False, zorder=3)
    axes.set_yticks(range(len(lanes)), [f"rank {r}" for r in range(len(lanes))])
    axes.invert_yaxis()
    axes.set_xlim(0, length)
    axes.set_xlabel("time, in forwards of one stage")
    axes.set_title(f"{title}: bubble {100 * timeline.bubble:.1f} %, at most {max(timeline.live)} live activations", fontsize=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    kinds = [k for k in COLORS if any(s.step.kind == k for lane in lanes for s in lane)]
    names = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
    handles = [axes.barh([0], [0], color=COLORS[k], label=names[k]) for k in kinds]
    shown = [k for k in MARKS if any(m.kind == k for marks in timeline.marks for m in marks)]
    handles += [axes.plot([], [], MARKS[k][0], color=MARKS[k][1], label=MARKS[k][2])[0] for k in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _key(kind: str, stage: int, micro_batch: int) -> tuple[str, int, int]:
    # The previous stage waits for the input's gradient, whether or not the weights' are computed with it.
    return ("I" if kind == "B" else kind, stage, micro_batch)


def _needs(step: Action, stages: int) -> list[tuple[str, int, int]]:
    stage, m = step.stage, step.micro_batch
    match step.kind:
        case "F":
            return [("F", stage - 1, m)] if stage else []
        case "W":
            return [("I", stage, m)]
        case _:
            return [("F", stage, m), *([("I", stage + 1, m)] if stage < stages - 1 else [])]


def _marks(queue: list[Action], lane: list[Span]) -> list[Mark]:
    """Times of the exchanges in `queue`, given those of its computations."""
    marks, ran = [], 0
    for i, step in enumerate(queue):
        if step.micro_batch >= 0:
            ran += 1
        elif step.kind in MARKS:
            # A reduction announced before the last backward of its stage happens at the end of that backward.
            ahead = step.kind == "R" and i + 1 < len(queue) and queue[i + 1].stage == step.stage and queue[i + 1].micro_batch >= 0
            place = ran if ahead else ran - 1
            marks.append(Mark(step.kind, step.stage, lane[place].end if place >= 0 else 0.0))
    return marks


def _live(lane: list[Span]) -> int:
    alive = most = 0
    for s in lane:
        alive += {"F": 1, "B": -1, "W": -1, "I": 0}[s.step.kind]
        most = max(most, alive)
    return most


def _sends(lane: list[Span], rank_of: dict[int, int], stages: int) -> int:
    count = 0
    for s in lane:
        to = s.step.stage + (1 if s.step.kind == "F" else -1)
        if s.step.kind != "W" and 0 <= to < stages and rank_of[to] != rank_of[s.step.stage]:
            count += 1
    return count
