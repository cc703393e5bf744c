"""Two processes of one thread against one process of one thread, ours and plain PyTorch for the same axis, in turn in one run.

`python -m benchmarks.two_processes.scaling [ROUNDS]` on a machine with two free cores.
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from benchmarks.common import machine, next_token_batch, one_step, toy, trained, write
from benchmarks.two_processes.plain import Plain, wrap
from megascale.config.schema import Model, Parallel
from megascale.data.loader import Batch
from tests.ranks import run_ranks

CFG = Model(num_layers=6, hidden_size=512, num_heads=8, vocab_size=8192, ffn="gelu", ffn_size=2048)
SEQ, BATCH, STEPS = 256, 8, 4
LAYOUTS = {
    "none": Parallel(),
    "ddp": Parallel(engine="ddp", dp_replicate=2, dp_shard=1),
    "fsdp2": Parallel(dp_shard=2),
    "tp": Parallel(tp=2, dp_shard=1),
}


def share(axis: str) -> Batch:
    """This rank's part of the global batch: half of it under data parallelism."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 8192, (BATCH, SEQ + 1))
    if axis in ("ddp", "fsdp2"):
        tokens = tokens.chunk(2)[dist.get_rank()]
    return next_token_batch(tokens)


def timed(step: Any) -> list[float]:
    for _ in range(2):
        step()
    seconds = []
    for _ in range(STEPS):
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def ours(axis: str) -> list[float]:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    _, engine = trained(toy(CFG, SEQ, LAYOUTS[axis]), ranks, torch.device("cpu"))
    return timed(partial(one_step, engine, [share(axis)], 1 / (BATCH * SEQ)))


def plain(axis: str) -> list[float]:
    torch.manual_seed(1)
    model, batch = wrap(Plain(CFG), axis), share(axis)
    # torch clips and steps DTensors and plain tensors only apart.
    groups = [g for g in ([p for p in model.parameters() if isinstance(p, DTensor) is cut] for cut in (True, False)) if g]
    optimizer = torch.optim.AdamW([{"params": g} for g in groups], lr=1e-4, foreach=True)

    def step() -> None:
        model(batch.tokens, batch.targets).backward()
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step)


def main() -> None:
    seconds: dict[str, list[float]] = {}
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        for axis in LAYOUTS:
            for name, run in (("megascale", ours), ("plain", plain)):
                # The slower rank decides when a step is over.
                ranks = run_ranks(1 if axis == "none" else 2, run, axis, timeout=300)
                seconds.setdefault(f"{name} {axis}", []).extend(map(max, zip(*ranks)))
                print(f"{name} {axis}: {seconds[f'{name} {axis}']}", flush=True)
    median = {k: statistics.median(v) for k, v in seconds.items()}
    write(
        __file__,
        "scaling",
        {
            "machine": machine() | {"threads": 1},
            "parameters": sum(p.numel() for p in Plain(CFG).parameters()),
            "tokens_per_step": SEQ * BATCH,
            "seconds": median,
            "speed_over_one_process": {a: median["megascale none"] / median[f"megascale {a}"] for a in LAYOUTS if a != "none"},
            "plain_speed_over_one_process": {a: median["plain none"] / median[f"plain {a}"] for a in LAYOUTS if a != "none"},
            "speed_over_plain": {a: median[f"plain {a}"] / median[f"megascale {a}"] for a in LAYOUTS},
        },
    )


if __name__ == "__main__":
    main()
