"""Idle share of every schedule on 4 ranks whose stages sleep for a calibrated time, compared with the model's; and the runtime's own cost.

`python -m benchmarks.pipelines.bubble` (six minutes, any machine: sleeping ranks need no cores).
"""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import machine, write
from megascale.comm.mesh import build_mesh
from megascale.config.layout import axis_sizes
from megascale.config.schema import Parallel
from megascale.config.stages import stages_of_rank
from megascale.data.loader import Batch
from megascale.model.layers import Linear
from megascale.schedule.orders import compute_order
from megascale.schedule.pipeline import Runtime, deferred_gradients
from megascale.schedule.timeline import simulate
from tests.ranks import run_ranks

RANKS, M, UNIT, STEPS = 4, 8, 0.6, 1  # UNIT: seconds of a rank's forward, shared among its stages
SCHEDULES = {"gpipe": 1, "1f1b": 1, "looped_bfs": 2, "interleaved_1f1b": 2, "interleaved_zero_bubble": 2, "zbv": 2, "dualpipev": 2}


class Nap(torch.autograd.Function):
    """Sleeps `unit` forward; backward `unit` for the input and `unit` for the weights, the latter queued where the schedule splits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: float, joint: Linear) -> Tensor:
        ctx.unit, ctx.joint = unit, joint
        time.sleep(unit)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        time.sleep(ctx.unit)
        if ctx.joint.deferred is None:
            time.sleep(ctx.unit)
        else:
            ctx.joint.deferred.append(lambda: time.sleep(ctx.unit))
        return grads[0], None, None


class SleepingStage(nn.Module):
    def __init__(self, unit: float, first: bool, last: bool) -> None:
        super().__init__()
        self.unit, self.first, self.last = unit, first, last
        self.joint = Linear(1, 1, "up", 0, 0.0, torch.float32)  # for its queue
        self.cfg, self.shape = SimpleNamespace(hidden_size=1), SimpleNamespace(compute=torch.float32)

    def stream_shapes(self, batch: torch.Size) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        return (*batch, 1), (*batch, 1)  # type: ignore[return-value]

    def forward(self, tokens: Tensor, *, stream: Tensor | None, scale: float, **_: Any) -> Tensor:
        x = torch.zeros(*tokens.shape, 1, requires_grad=True) if stream is None else stream
        y: Tensor = Nap.apply(x, self.unit, self.joint)
        return y.sum() * scale if self.last else y


def measured(schedule: str, unit: float) -> float:
    """Median seconds of a step."""
    cfg = Parallel(pp=RANKS, pp_schedule=schedule, pp_virtual=SCHEDULES[schedule])  # type: ignore[arg-type]
    mesh = build_mesh(axis_sizes(cfg, RANKS), "cpu")
    numbers = stages_of_rank(schedule, RANKS, cfg.pp_virtual, mesh["pp"].rank)
    total = RANKS * len(numbers)
    model: Any = SimpleNamespace(mesh=mesh, stages=[SleepingStage(unit / len(numbers), i == 0, i == total - 1) for i in numbers])
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    batches = [Batch(tokens, tokens, None, None, tokens[:, 0], 2)] * M
    runtime = Runtime(model, numbers, deferred_gradients(model.stages, schedule), cfg, M, tokens.shape, torch.device("cpu"))
    runtime.step(batches, 1.0, "train")
    seconds = []
    for _ in range(STEPS):
        torch.distributed.barrier()
        start = time.perf_counter()
        runtime.step(batches, 1.0, "train")
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    result: dict[str, Any] = {}
    for schedule, virtual in SCHEDULES.items():
        order = compute_order(schedule, RANKS, virtual, M)
        model = simulate(order)
        seconds = max(run_ranks(RANKS, measured, schedule, UNIT, timeout=300))
        idle = max(run_ranks(RANKS, measured, schedule, 0.0, timeout=300))
        # With backwards counted twice a forward a rank works 3·M units whatever the schedule.
        bubble = 1 - 3 * M * UNIT / seconds
        actions = max(sum(1 for _ in lane) for lane in model.lanes)
        result[schedule] = {
            "bubble_measured": round(bubble, 4),
            "bubble_of_the_model": round(model.bubble, 4),
            "step_over_model": round(seconds / (3 * M * UNIT / (1 - model.bubble)), 4),
            "microseconds_an_action_of_empty_stages": round(idle / actions * 1e6, 1),
        }
        print(schedule, result[schedule], flush=True)
    write(__file__, "bubble", {"machine": machine(), "ranks": RANKS, "micro_batches": M, "unit_seconds": UNIT, "schedules": result})


if __name__ == "__main__":
    main()
