"""Merging checkpoints of a 7B-shaped model of a few layers, in bf16: speed compared with `cp` of the same files, and memory.

`python -m benchmarks.growth.merging WORK` needs about 9 GB for three sources of two layers and a result. `cp` of all sources and the merge
alternate, each with a sync at its end; what is compared is bytes of sources per second. Memory as in streaming.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from pathlib import Path

from benchmarks.common import machine, write
from benchmarks.growth.streaming import bytes_of, make_source, timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sources", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--slab-mb", type=int, default=128)
    args = parser.parse_args()
    sources = [args.work / f"merge-{args.layers}-{n}" for n in range(args.sources)]
    for source in sources:
        if not (source / "latest").exists():
            make_source(source, args.layers)
    size = sum(bytes_of(source) for source in sources)
    copies, merges, peaks = [], [], []
    for _ in range(args.rounds):
        copy, target = args.work / "copy", args.work / "merged"
        copy.mkdir(exist_ok=True)
        copies.append(timed(["cp", "-r", *map(str, sources), str(copy)])[0])
        shutil.rmtree(copy)
        command = [sys.executable, "-m", "megascale", "merge", *map(str, sources), "--out", str(target), "--trust-source"]
        seconds, peak = timed([*command, "--workers", str(args.workers), "--max-slab-mb", str(args.slab_mb)])
        merges.append(seconds)
        peaks.append(peak)
        shutil.rmtree(target)
    ratios = [copied / merged for copied, merged in zip(copies, merges)]
    result = {
        "machine": machine(),
        "load_before": os.getloadavg()[0],
        **{k: v for k, v in vars(args).items() if k != "work"},
        "gigabytes_of_sources": round(size / 1e9, 2),
        "copy_seconds": [round(s, 1) for s in copies],
        "merge_seconds": [round(s, 1) for s in merges],
        "share_of_copy_speed": round(statistics.median(ratios), 2),
        "peak_gigabytes": round(max(peaks) / 1e9, 2),
    }
    print(result)
    write(__file__, "merging", result)


if __name__ == "__main__":
    main()
