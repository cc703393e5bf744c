"""Checkpoint write speed compared with `dd conv=fsync` of the same bytes, and how long an asynchronous save stalls training.

All kinds of a table are measured in turn, round by round: a shared disk's speed changes from minute to minute. Medians over the rounds.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer

from megascale.checkpoint.loader import load
from megascale.checkpoint.planning import PlanCache, checksum
from megascale.checkpoint.saver import Checkpointer, write_checkpoint
from megascale.cli import new_app, run_tool
from megascale.comm.piece import Piece, chunk_bounds

app = new_app(__doc__ or "")
Measure = Callable[[Path, int], float]  # (scratch folder, round) → seconds


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="JSON to write")] = Path("benchmarks/checkpoint/results/save.json"),
    folder: Annotated[Path | None, typer.Option(help="where to write the checkpoints: its disk is measured")] = None,
    megabytes: Annotated[int, typer.Option(help="size of the state, in 10^6 bytes")] = 350,
    tensors: Annotated[int, typer.Option(help="tensors that it is divided into")] = 120,
    rounds: Annotated[int, typer.Option(min=5)] = 9,
) -> None:
    """Saves a state of MEGABYTES on one rank and on two, sharded and replicated."""
    result: dict[str, Any] = {"cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}
    result |= {"bytes": sum(4 * rows * 1024 for rows in row_counts(megabytes, tensors)), "tensors": tensors, "rounds": rounds}
    with tempfile.TemporaryDirectory(dir=folder, prefix="megascale-benchmark-") as scratch:
        for ranks in (1, 2):
            place = Path(scratch) / f"ranks-{ranks}"
            place.mkdir()
            mp.spawn(measure, (ranks, str(place), megabytes, tensors, rounds), nprocs=ranks)  # type: ignore[no-untyped-call]
            result[f"ranks_{ranks}"] = json.loads((place / "result.json").read_text())
            shutil.rmtree(place)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def row_counts(megabytes: int, tensors: int) -> list[int]:
    """Rows of 1024 fp32 numbers of each tensor: a few large ones and many small, as in a model."""
    unit = megabytes * 10**6 / 4096
    weights = [8 if i % 8 == 0 else 1 for i in range(tensors)]
    return [max(2, int(unit * w / sum(weights))) for w in weights]


def pieces(megabytes: int, tensors: int, ranks: int, rank: int, replicated: bool) -> dict[str, Piece]:
    result = {}
    for i, rows in enumerate(row_counts(megabytes, tensors)):
        first, last = (0, rows) if replicated else chunk_bounds(rows, ranks, rank)
        local = torch.randn(last - first, 1024, generator=torch.Generator().manual_seed(i))
        result[f"model.blocks.{i}.weight"] = Piece((rows, 1024), (first, 0), local)
    return result


def measure(rank: int, ranks: int, place: str, megabytes: int, tensors: int, rounds: int) -> None:
    """One rank of the measurement; rank 0 writes result.json."""
    torch.set_num_threads(1)
    scratch = Path(place)
    if ranks > 1:
        dist.init_process_group("gloo", store=dist.FileStore(str(scratch / "store"), ranks), rank=rank, world_size=ranks)
    sharded = pieces(megabytes, tensors, ranks, rank, replicated=False)
    size = sum(4 * rows * 1024 for rows in row_counts(megabytes, tensors))
    kinds: dict[str, Measure] = {
        "dd": lambda where, step: dd(where, size) if rank == 0 else 0.0,
        "save": saving(sharded),
    }
    if ranks > 1:
        kinds["save_without_comparing"] = saving(sharded, compare=False)
        kinds["save_replicated"] = saving(pieces(megabytes, tensors, ranks, rank, replicated=True))
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for step in range(rounds):
        # Each kind twice, the second time counts: memory that another kind has given back is slow to fill on a virtual machine, and `dd`
        # alone takes two or three times as long after a save as after itself.
        for kind, work in list(kinds.items())[:: 1 - 2 * (step % 2)]:
            for _ in range(2):
                if rank == 0:
                    os.sync()
                meet(ranks)
                taken = work(scratch, step)
                meet(ranks)
                if rank == 0:
                    shutil.rmtree(scratch / "saved", ignore_errors=True)
            seconds[kind].append(taken)
    result: dict[str, Any] = {f"{k}_seconds": [round(s, 4) for s in v] for k, v in seconds.items()}
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    if rank == 0:
        result |= {f"{k}_gigabytes_per_second": round(size / 1e9 / s, 3) for k, s in medians.items()}
        result |= {f"{k}_share_of_dd": round(medians["dd"] / s, 3) for k, s in medians.items() if k != "dd"}
    result |= {"stall": stall(sharded, scratch, ranks, rounds), "load_seconds": round(loading(sharded, scratch, ranks), 4)}
    start = time.perf_counter()
    for piece in sharded.values():
        checksum(piece.local)
    result["checksums_of_replicas_seconds"] = round(time.perf_counter() - start, 4)
    if rank == 0:
        (scratch / "result.json").write_text(json.dumps(result))
    if ranks > 1:
        dist.destroy_process_group()


def meet(ranks: int) -> None:
    if ranks > 1:
        dist.barrier()


def dd(where: Path, size: int) -> float:
    """Seconds of dd for `size` bytes of zeros, on the disk when it ends."""
    target = where / "dd"
    start = time.perf_counter()
    count, rest = divmod(size, 1 << 20)
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={target}", "bs=1M", f"count={count + (rest > 0)}", "conv=fsync"], check=True, stderr=subprocess.DEVNULL
    )
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def saving(state: dict[str, Piece], compare: bool = True) -> Measure:
    """Seconds of a save that is on the disk and published when it returns."""
    cache = PlanCache()

    def save(where: Path, step: int) -> float:
        start = time.perf_counter()
        write_checkpoint(where / "saved", step, state, {"step": step}, compare_replicas=compare, cache=cache)
        return time.perf_counter() - start

    return save


def stall(state: dict[str, Piece], scratch: Path, ranks: int, rounds: int) -> dict[str, Any]:
    """Time of the training thread in `save`, and in only copying the state into reused buffers, in turn."""
    saver = Checkpointer(scratch / "stall", keep_last=1, keep_every=None, asynchronous=True)
    buffers = [torch.empty_like(p.local) for p in state.values()]
    copies, saves = [], []
    for step in range(rounds + 1):
        meet(ranks)
        start = time.perf_counter()
        for buffer, piece in zip(buffers, state.values()):
            buffer.copy_(piece.local)
        middle = time.perf_counter()
        meet(ranks)
        begin = time.perf_counter()
        saver.save(step, state, {"step": step})
        end = time.perf_counter()
        assert [e.kind for e in saver.finish()] == ["saved"]
        if step:
            copies.append(middle - start)
            saves.append(end - begin)
    copy, save = statistics.median(copies), statistics.median(saves)
    return {"copy_seconds": round(copy, 4), "save_seconds": round(save, 4), "save_over_copy": round(save / copy, 3)}


def loading(state: dict[str, Piece], scratch: Path, ranks: int) -> float:
    """Seconds to check and read the last of the saves above, which the system still has in memory."""
    meet(ranks)
    (folder,) = (scratch / "stall").glob("step-*")
    start = time.perf_counter()
    load(folder, state)
    return time.perf_counter() - start


if __name__ == "__main__":
    run_tool(app)
