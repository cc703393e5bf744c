"""A 7B-shaped checkpoint of weights alone, in bf16, grown to 13B on two cores: memory and speed compared with a plain copy of the result.

`python -m benchmarks.growth.streaming WORK` needs 14 GB for the source, which is kept for the next time, and 26 GB for the result, which is
not; `--layers 4` is an eighth of all that. The disk's copy speed is that of `cp` of the source with a sync, in bytes written; each is begun
with what the page cache then holds, after a sync. Memory is the largest sum of all processes' pages, shared ones divided (PSS), while
growing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.common import machine, write
from megascale.checkpoint.streaming import Target, write_streamed
from megascale.config.identity import identity
from megascale.config.load import build_config
from megascale.expand.stack import specs


def config_of(layers: int) -> dict[str, Any]:
    return {
        "model": {"num_layers": layers, "hidden_size": 4096, "num_heads": 32, "ffn_size": 11008, "vocab_size": 32000},
        "train": {"steps": 1, "seq_len": 2048},
        "data": {"train": "-"},
        "precision": {"compute": "bf16", "master": "bf16"},
    }


@dataclass(frozen=True)
class Noise:
    """Weights of a plausible size; what they are does not change the time."""

    def __call__(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(hash((name, offset)) % 2**31)
        rows = torch.randn((min(64, shape[0]), shape[-1]), generator=generator).mul_(0.02).to(torch.bfloat16)
        return rows.repeat(-(-shape[0] // len(rows)), 1)[: shape[0]]


def make_source(folder: Path, layers: int) -> None:
    config = build_config(config_of(layers))
    targets = [Target(f"model.{n}", torch.bfloat16, s.shape) for n, s in specs(config.model, 2048).items()]
    trainer = {"step": 0, "samples": 0, "tokens": 0, "identity": identity(config), "config": config.plain()}
    write_streamed(folder, 0, targets, Noise(), trainer, stamp="source", slab_bytes=64 << 20)


def peak_memory(process: subprocess.Popen[bytes], found: list[int]) -> None:
    """The largest PSS of a process and its children, sampled ten times per second."""
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        for p in (parent, *parent.children(recursive=True)):
            try:
                total += p.memory_full_info().pss
            except psutil.Error:
                continue
        found.append(total)
        time.sleep(0.1)


def timed(command: list[str]) -> tuple[float, int]:
    """(seconds, largest memory) of a command that must succeed, its writes on disk."""
    subprocess.run(["sync"], check=True)
    begin = time.perf_counter()
    process, memory = subprocess.Popen(command), [0]
    watch = threading.Thread(target=peak_memory, args=(process, memory))
    watch.start()
    code = process.wait()
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - begin
    watch.join()
    if code:
        raise SystemExit(code)
    return seconds, max(memory)


def bytes_of(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--slab-mb", type=int, default=128)
    parser.add_argument("--make-only", action="store_true", help="make the source and stop")
    parser.add_argument("--methods", nargs="+", default=["zero"], choices=["zero", "duplicate"])
    parser.add_argument("--check", action="store_true", help="read the source's checksums first, as grow.py does by itself")
    args = parser.parse_args()
    source = args.work / f"source-{args.layers}"
    if not (source / "latest").exists():
        make_source(source, args.layers)
    if args.make_only:
        return
    layers = args.layers * 5 // 4
    result: dict[str, Any] = {"machine": machine(), **{k: v for k, v in vars(args).items() if k in ("layers", "workers", "slab_mb")}}
    copy = args.work / "copy"
    copied, _ = timed(["cp", "-r", str(source), str(copy)])
    shutil.rmtree(copy)
    copy_speed = bytes_of(source) / copied
    result["copy"] = {"seconds": round(copied, 1), "megabytes_per_second": round(copy_speed / 1e6)}
    for method in args.methods:
        target, report = args.work / "grown", args.work / "report.json"
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "tools/grow.py", str(source), str(target), "--hidden-size", "5120", "--num-heads", "40",
                   "--ffn-size", "13824", "--num-layers", str(layers), "--width-method", method, "--ffn-method", method,
                   "--heads-method", method, "--tokens", "0",
                   "--workers", str(args.workers), "--max-slab-mb", str(args.slab_mb), "--report", str(report)]  # fmt: skip
        seconds, memory = timed([*command, *([] if args.check else ["--trust-source"])])
        size = bytes_of(target)
        told = json.loads(report.read_text())
        shutil.rmtree(target)
        result[method] = {
            "gigabytes": round(size / 1e9, 2),
            "parameters": told["parameters"],
            "seconds": round(seconds, 1),
            "megabytes_per_second": round(size / 1e6 / seconds),
            "peak_gigabytes": round(memory / 1e9, 2),
            "share_of_copy_speed": round(size / seconds / copy_speed, 2),
        }
        print(method, result[method], flush=True)
    write(__file__, f"streaming-{args.layers}{'-checked' if args.check else ''}", result)


if __name__ == "__main__":
    main()
