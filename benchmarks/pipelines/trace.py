"""A real step of two pipeline ranks as a picture: when each computation began and ended, above the same order in model time.

`python -m benchmarks.pipelines.trace [SCHEDULE] [PICTURE]` on a machine with two free cores.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import machine, next_token_batch, toy, write
from benchmarks.pipelines.two_ranks import CFG, SEQ, M
from megascale.config.schema import Parallel
from megascale.schedule.orders import Action, compute_order
from megascale.schedule.pipeline import Pipeline, Stage
from megascale.schedule.timeline import Span, Timeline, draw, simulate
from megascale.train.build import draw_model
from tests.ranks import run_ranks

METHODS = {"F": "forward_one_chunk", "B": "backward_one_chunk", "W": "backward_weight_one_chunk"}


def spans(cfg: Parallel) -> list[tuple[str, int, int, float, float]]:
    """(kind, stage, micro-batch, start, end) of this rank's third step, in seconds since all ranks began it."""
    cpu = torch.device("cpu")
    schedule = Pipeline(draw_model(toy(CFG, SEQ, cfg), cfg.pp, cpu), cfg, cpu)
    found: list[tuple[str, int, int, float, float]] = []
    for kind, name in METHODS.items():
        _record(kind, name, found)
    torch.manual_seed(0)
    batches = [next_token_batch(t) for t in torch.randint(0, CFG.vocab_size or 0, (M, 1, SEQ + 1))]
    begin = 0.0
    for _ in range(3):
        found.clear()
        dist.barrier()
        begin = time.perf_counter()
        schedule.run(batches, 1.0)
    return [(kind, stage, m, start - begin, end - begin) for kind, stage, m, start, end in found]


def _record(kind: str, name: str, found: list[tuple[str, int, int, float, float]]) -> None:
    real: Callable[..., Any] = getattr(Stage, name)

    def timed(stage: Any, chunk: int, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = real(stage, chunk, *args, **kwargs)
        # A backward that leaves the weights for later computes the input's gradient only.
        split = kind == "B" and kwargs.get("full_backward") is False
        found.append(("I" if split else kind, stage.stage_index, chunk, start, time.perf_counter()))
        return result

    setattr(Stage, name, timed)


def main() -> None:
    schedule = sys.argv[1] if len(sys.argv) > 1 else "1f1b"
    picture = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "results" / f"trace_{schedule}.png"
    virtual = 1 if schedule in ("1f1b", "gpipe") else 2
    cfg = Parallel(pp=2, pp_schedule=schedule, pp_virtual=virtual)  # type: ignore[arg-type]
    lanes = run_ranks(2, spans, cfg, timeout=300)
    unit = statistics.median(end - start for lane in lanes for kind, _, _, start, end in lane if kind == "F")
    drawn = [[Span(Action(kind, stage, m), start / unit, end / unit) for kind, stage, m, start, end in lane] for lane in lanes]
    model = simulate(compute_order(schedule, 2, virtual, M))
    busy = sum(s.end - s.start for lane in drawn for s in lane)
    bubble = 1 - busy / (2 * max(s.end for lane in drawn for s in lane))
    timeline = Timeline(drawn, bubble, model.live, model.sends, [[], []])
    draw(timeline, f"{schedule}, two ranks, as it ran ({unit * 1e3:.0f} ms a forward)", picture)
    facts = {"bubble_measured": round(bubble, 4), "bubble_of_the_model": round(model.bubble, 4), "forward_seconds": round(unit, 4)}
    write(__file__, f"trace_{schedule}", {"machine": machine(), "micro_batches": M, "schedule": schedule, **facts})


if __name__ == "__main__":
    main()
