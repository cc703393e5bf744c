"""Memory of a rank in a causal training step, by ranks and length: `python -m benchmarks.sequence.memory [--long]`.

Each process takes one step (forward and backward) of a small decoder; counted is what torch allocates meanwhile, by storage, at its most.
--long: 65,536 tokens on four ranks, and all that they have resident together.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import Allocations, machine, toy, write
from megascale.config.schema import Model, Parallel
from megascale.model.ops.attention_tiles import visible_pairs
from megascale.parallel.context import places
from megascale.train.build import draw_model

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "ffn_size": 192, "vocab_size": 256}


def peak() -> int:
    """Bytes that this process has had resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rank_main(rank: int, n: int, method: str, length: int, store: str) -> None:
    torch.set_num_threads(1)
    if n > 1:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=n)
    cfg = Parallel(cp=n, cp_method=method, engine="ddp")  # type: ignore[arg-type]
    model = draw_model(toy(Model(**SIZES), length, cfg), n, torch.device("cpu"))
    tokens = torch.randint(0, SIZES["vocab_size"], (1, length + 1), generator=torch.Generator().manual_seed(1))
    begin = time.perf_counter()
    with Allocations() as made:
        loss = model.module(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), scale=1 / length)
        loss.backward()
    total = loss.detach()
    seconds = time.perf_counter() - begin
    if n > 1:
        dist.all_reduce(total)
    print(json.dumps({"allocated": made.most, "resident": peak(), "seconds": seconds, "loss": total.item()}))


def measure(n: int, method: str, length: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "benchmarks.sequence.memory", "--rank"]
        rest = [str(n), method, str(length), f"file://{folder}/store"]
        running = [subprocess.Popen([*words, str(r), *rest], stdout=subprocess.PIPE, text=True) for r in range(n)]
        found = [json.loads(p.communicate()[0].strip().splitlines()[-1]) for p in running]
    return {
        "ranks": n,
        "method": method,
        "tokens": length,
        "allocated_bytes": max(f["allocated"] for f in found),
        "resident_bytes_together": sum(f["resident"] for f in found),
        "seconds": max(f["seconds"] for f in found),
        "loss": found[0]["loss"],
    }


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank, n, method, length, store = sys.argv[2:]
        rank_main(int(rank), int(n), method, int(length), store)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true")
    args = parser.parse_args()
    about = {"machine": machine() | {"threads": 1}, "model": SIZES}
    if args.long:
        held = places(65536, 4)
        work = [sum(visible_pairs(mine, block) for block in held) for mine in held]
        write(__file__, "long", about | {"run": measure(4, "ring", 65536), "most_work_over_mean": max(work) * len(work) / sum(work)})
        return
    runs = [measure(n, method, 16384) for method in ("ring", "ulysses") for n in (1, 2, 4)]
    for run in runs:
        alone = next(r for r in runs if r["method"] == run["method"] and r["ranks"] == 1)
        run["share_of_one_rank"] = run["allocated_bytes"] / alone["allocated_bytes"]
    write(__file__, "memory", about | {"runs": runs})


if __name__ == "__main__":
    main()
