"""What grows with the number of ranks: groups, the start, heartbeats, a save and a resume, the order of samples, the SLURM script.

    python -m benchmarks.scale.ranks [RANKS …]        # 512 4096 16384

Each number of ranks runs in a process of its own, as one rank among simulated ones; seconds are CPU seconds of that process, `resident` its
largest memory. Two models: 8B with its weights sharded over all ranks, which makes most pieces, and 405B on tp 8, pp 16. It needs no GPU.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import machine, write
from megascale.checkpoint.index import DTYPES, TRAINER, FileEntry, Index, read_index
from megascale.checkpoint.joining import Held, join, packed
from megascale.checkpoint.planning import LoadPlanner, views
from megascale.checkpoint.shards import shard_name
from megascale.checkpoint.storage import ShardReader
from megascale.comm.mesh import build_mesh, coordinates
from megascale.comm.piece import Piece, chunk_bounds
from megascale.comm.roll import Word, disagreement
from megascale.config.layout import axis_sizes
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.config.stages import stage_parts, stages_of_rank
from megascale.data.loader import sample_numbers
from megascale.data.order import plan_mixture
from megascale.launch.pools import Pool
from megascale.launch.ranks import RankInfo
from megascale.launch.slurm import Job, render
from megascale.planning.weights import Cuts, units_of
from megascale.trace.group import CALLS, start
from megascale.train.faults.watchdog import Heartbeat, PeerView, Watchdog, find_hang

RANKS = (512, 4096, 16384)
LAYOUTS: dict[str, tuple[str, list[str]]] = {
    "8B, fsdp": ("llama-8b", ["parallel.tp=1", "parallel.dp_replicate=1", "parallel.dp_shard=-1"]),
    "405B, tp 8, pp 16": ("llama-405b", ["parallel.tp=8", "parallel.pp=16", "parallel.dp_replicate=1", "parallel.dp_shard=-1"]),
}


class Timed:
    """Rows of CPU seconds."""

    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.process_time()
        yield
        self.rows[name] = round(time.process_time() - begin, 4)


def config_of(name: str, ranks: int) -> Config:
    file, overrides = LAYOUTS[name]
    return load_config(f"configs/{file}.yaml", [*overrides, f"train.global_batch_size={max(2048, ranks)}"])


def pieces(config: Config, ranks: int) -> Callable[[int], list[Held]]:
    """What a rank's state holds: every weight that its stage has, cut over tp and sharded, with both moments and the count of steps."""
    sizes, units = axis_sizes(config.parallel, ranks), units_of(config)
    cuts = Cuts(tp=sizes["tp"], shard=sizes["dp_shard"])
    parts = stage_parts(config.model, config.parallel, config.train.seq_len)

    def weights(number: int) -> Iterator[tuple[str, Any, int]]:
        for stage in stages_of_rank(config.parallel.pp_schedule, sizes["pp"], config.parallel.pp_virtual, number):
            if parts[stage].first:
                yield from ((n, w, 1) for n, w in units.front.names.items())
            for i in parts[stage].layers:
                unit = units.layers[i]
                yield from ((f"blocks.{i}.{n}", w, unit.model.num_kv_heads or unit.model.num_heads) for n, w in unit.names.items())
            if parts[stage].last:
                yield from ((n, w, 1) for n, w in units.tail.names.items())

    listed = [list(weights(number)) for number in range(sizes["pp"])]

    def of(rank: int) -> list[Held]:
        at = coordinates(rank, sizes)
        found = []
        for name, w, kv_heads in listed[at["pp"]]:
            local, offset = list(cuts.local(w, kv_heads)), [0] * len(w.shape)
            if isinstance(cut := cuts.cut(w, kv_heads), int):
                offset[cut] = at["tp"] * local[cut]
            first, last = chunk_bounds(local[0], sizes["dp_shard"], at["dp_shard"])
            offset[0], local[0] = offset[0] + first, last - first
            local = [max(0, min(n, s - o)) for n, s, o in zip(local, w.shape, offset)]
            if 0 not in local:
                found += [Held(f"{kind}.{name}", "F32", w.shape, tuple(offset), tuple(local)) for kind in ("model", "optim.m", "optim.v")]
            found.append(Held(f"optim.step.{name}", "F32", (), (), ()))
        return found

    return of


def save_and_load(name: str, ranks: int) -> dict[str, Any]:
    """A first save as the first rank sees it, the next one's comparison of copies, and a resume's plan as the last rank makes it."""
    timed, of = Timed(), pieces(config_of(name, ranks), ranks)
    with timed("rank_says_what_it_holds"):
        first = packed(of(0))
    everyone = [first, *(packed(of(rank)) for rank in range(1, ranks))]
    with timed("first_save_joins"):
        joined = join(everyone)
    sums = [[0] * len(names) for names in joined.names]
    with timed("each_save_compares_copies"):
        joined.unlike(sums)
    files = {shard_name(rank): FileEntry(1 << 50, 0) for rank in range(ranks)} | {TRAINER: FileEntry(2, 0)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.json"
        with timed("index_is_written"):
            path.write_text(Index.made(Path(folder), files, joined.tensors).to_json())
        size = path.stat().st_size
        with timed("index_is_read"):
            index = read_index(folder)
        state = {h.name: Piece(h.shape, h.offset, torch.empty(h.sizes, dtype=DTYPES[h.dtype], device="meta")) for h in of(ranks - 1)}
        reader = ShardReader(index)
        with timed("resume_plans"):
            planner = LoadPlanner("here", reader.overlapping)
            planner.set_up_planner(views(state), reader.read_metadata(), False)
            planner.create_local_plan()
    words = {"pieces": sum(map(len, joined.names)), "sent_to_first_rank_bytes": sum(map(len, everyone)), "index_bytes": size}
    return {**words, **timed.rows}


def groups(ranks: int) -> dict[str, Any]:
    """The mesh of 405B as the middle rank makes it: one call for each of the groups of gloo, and those that NCCL splits at once."""
    timed, sizes = Timed(), axis_sizes(config_of("405B, tp 8, pp 16", ranks).parallel, ranks)
    start(ranks // 2, ranks, CALLS)
    made, real = 0, dist.new_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        return real(*args, **kwargs)

    dist.new_group = counted
    with timed("mesh"):
        mesh = build_mesh(sizes, "cpu")
    own = len({axis.group for axis in mesh.axes.values() if axis.group is not None})
    dist.new_group = real
    dist.destroy_process_group()
    return {"groups_of_this_rank": own, "calls_with_gloo": made, **timed.rows}


def meeting(ranks: int) -> dict[str, Any]:
    """The first rank's part in the roll call and in a second of heartbeats, over a store of this process."""
    timed = Timed()
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    for rank in range(ranks):
        store.set(f"roll/{rank}", json.dumps(asdict(Word(f"node-{rank // 8:05d}", "cuda"))))
    with timed("roll_call"):
        keys = [f"roll/{rank}" for rank in range(ranks)]
        store.wait(keys)
        disagreement([Word(**json.loads(text)) for text in store.multi_get(keys)])
    beats = [Heartbeat(rank, f"node-{rank // 8:05d}", 100, 1000, "training", 123456, "all_gather over dp_shard") for rank in range(ranks)]
    for beat in beats:
        store.set(f"watch/{beat.rank}", json.dumps(asdict(beat)))
    watch = Watchdog(RankInfo(0, ranks, 0, 1), None, 600.0)
    watch._closed.set()
    watch.store = dist.PrefixStore("watch", store)
    watch._heartbeats()
    views = [PeerView(beat, 0.0, 0.0) for beat in beats]
    with timed("heartbeats_once"):
        seen = watch._heartbeats()
        for view, beat in zip(views, seen):
            view.see(beat, 1.0)
        find_hang(views, 1.0, 120.0, 600.0)
    sent = sum(len(json.dumps(asdict(beat))) for beat in beats)
    return {"heartbeat_bytes_once": sent, "heartbeat_every_seconds": watch.every, **timed.rows}


def samples(ranks: int) -> dict[str, Any]:
    """Where the last of as many data ranks finds its first batch: nothing that depends on the others."""
    timed = Timed()
    plan = plan_mixture([0.7, 0.2, 0.1], ["a", "b", "c"], 1)
    plan.locate(0)
    with timed("first_batch"):
        for numbers in sample_numbers(10**9, 4 * ranks, 1, ranks - 1, ranks):
            for n in numbers:
                plan.locate(n)
    return timed.rows


def script(ranks: int) -> dict[str, Any]:
    timed = Timed()
    pool = Pool(str(ranks // 8), 8, 8)
    with timed("script"):
        text = render(Job("run", "/c.yaml", "/runs/run", "/code", "/code", "python", (pool,)))
    return {"script_bytes": len(text), **timed.rows}


def one(ranks: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"groups": groups(ranks), "start": meeting(ranks), "samples": samples(ranks), "slurm": script(ranks)}
    found |= {f"checkpoint of {name}": save_and_load(name, ranks) for name in LAYOUTS}
    found["resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def main(counts: list[int]) -> None:
    rows = {}
    for ranks in counts:
        done = subprocess.run([sys.executable, "-m", __spec__.name, "--one", str(ranks)], stdout=subprocess.PIPE, text=True, check=True)
        rows[str(ranks)] = json.loads(done.stdout.splitlines()[-1])
    write(__file__, "ranks", {"machine": machine(), "ranks": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(int(sys.argv[2]))))
    else:
        main([int(n) for n in sys.argv[1:]] or list(RANKS))
