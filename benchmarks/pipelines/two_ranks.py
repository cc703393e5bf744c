"""Two pipeline ranks of one thread against one process of one thread, every schedule, in turn in one run.

`python -m benchmarks.pipelines.two_ranks [ROUNDS]` on a machine with two free cores.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
import torch.distributed as dist

from benchmarks.common import machine, next_token_batch, one_step, toy, trained, write
from megascale.config.schema import Model, Parallel
from megascale.config.stages import stage_parts
from tests.ranks import run_ranks

CFG = Model(num_layers=10, hidden_size=512, num_heads=8, vocab_size=8192, ffn="gelu", ffn_size=2048)
SEQ, M, STEPS = 256, 8, 3
LAYOUTS = {
    "one process": Parallel(),
    "gpipe": Parallel(pp=2, pp_schedule="gpipe"),
    "1f1b": Parallel(pp=2),
    "interleaved_1f1b": Parallel(pp=2, pp_schedule="interleaved_1f1b", pp_virtual=2),
    "interleaved_zero_bubble": Parallel(pp=2, pp_schedule="interleaved_zero_bubble", pp_virtual=2),
    "zbv": Parallel(pp=2, pp_schedule="zbv"),
    "dualpipev": Parallel(pp=2, pp_schedule="dualpipev"),
}


def seconds(name: str) -> list[float]:
    cfg = LAYOUTS[name]
    ranks = cfg.pp
    _, engine = trained(toy(CFG, SEQ, cfg), ranks, torch.device("cpu"))
    torch.manual_seed(0)
    batches = [next_token_batch(t) for t in torch.randint(0, CFG.vocab_size or 0, (M, 1, SEQ + 1))]
    found = []
    for i in range(STEPS + 1):
        if ranks > 1:
            dist.barrier()
        start = time.perf_counter()
        one_step(engine, batches, 1 / (M * SEQ))
        if i:
            found.append(time.perf_counter() - start)
    return found


def main() -> None:
    taken: dict[str, list[float]] = {}
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        for name, cfg in LAYOUTS.items():
            # The slower rank decides when a step is over.
            taken.setdefault(name, []).extend(map(max, zip(*run_ranks(cfg.pp, seconds, name, timeout=300))))
            print(name, [round(s, 3) for s in taken[name]], flush=True)
    median = {name: statistics.median(s) for name, s in taken.items()}
    write(
        __file__,
        "two_ranks",
        {
            "machine": machine() | {"threads": 1},
            "micro_batches": M,
            "layers": {n: [len(p.layers) for p in stage_parts(CFG, cfg, SEQ)] for n, cfg in LAYOUTS.items()},
            "seconds": {n: round(s, 4) for n, s in median.items()},
            "speed_over_one_process": {n: round(median["one process"] / s, 3) for n, s in median.items() if n != "one process"},
        },
    )


if __name__ == "__main__":
    main()
