"""Time and memory of tools/convert.py on a Llama of 7 billion parameters in bf16, compared with `cp` of the same bytes to the same disk.

Both read files that are not in the page cache, and both are timed until their bytes are on the disk. Rounds take turns: a disk's speed
changes. The files hold random bytes below a header that describes the model: conversion does not look at numbers.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from benchmarks.common import machine, write
from megascale.cli import new_app, run_tool

app = new_app(__doc__ or "")
HIDDEN, FFN, VOCAB, HEADS = 4096, 11008, 32000, 32
FILE = 5 * 10**9


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="scratch folder on the disk to measure; three times the model must fit")],
    layers: Annotated[int, typer.Option(help="32 make 6.7 billion parameters")] = 32,
    workers: Annotated[list[int] | None, typer.Option(help="processes that write")] = None,
    rounds: Annotated[int, typer.Option()] = 2,
    prepare: Annotated[bool, typer.Option(help="make the source only, so that it can be made before the machine is quiet")] = False,
) -> None:
    """Converts hf → megascale → hf in rounds and writes results/stream_….json."""
    source = folder / "hf"
    if not source.exists():
        make(source, layers)
    if prepare:
        return
    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        found.setdefault("cp", []).append(timed(source, lambda: ["cp", "-r", str(source), str(folder / "copy")], folder / "copy"))
        shutil.rmtree(folder / "copy")
        for n in workers or [1, 2]:
            found.setdefault(f"hf to megascale, {n} workers", []).append(convert(source, folder / "ours", "hf", "megascale", n))
            if n != (workers or [1, 2])[-1]:
                shutil.rmtree(folder / "ours")
        found.setdefault("megascale to hf, 2 workers", []).append(convert(folder / "ours", folder / "back", "megascale", "hf", 2))
        for name in ("back", "ours"):
            shutil.rmtree(folder / name)
    result: dict[str, Any] = {**machine(), "cores": os.cpu_count(), "bytes": size, "parameters": size // 2, "rounds": rounds}
    for name, runs in found.items():
        seconds = statistics.median(r["seconds"] for r in runs)
        result["load_average"] = round(os.getloadavg()[1], 1)  # with more than about 1 from other processes only CPU seconds are meaningful
        result[name] = {
            "seconds": [round(r["seconds"], 1) for r in runs],
            "MB_per_second": round(size / 1e6 / seconds),
            "of_cp": round(statistics.median(r["seconds"] for r in found["cp"]) / seconds, 2),
            "cpu_seconds": [round(r["cpu"], 1) for r in runs],
            "private_MB": round(max(r["private"] for r in runs) / 1e6),
            "resident_MB": round(max(r["resident"] for r in runs) / 1e6),
        }
    write(__file__, f"stream_{size // 10**9}GB", result)


def convert(source: Path, target: Path, origin: str, to: str, workers: int) -> dict[str, float]:
    command = [sys.executable, "tools/convert.py", str(source), str(target), "--from", origin, "--to", to, "--workers", str(workers)]
    return timed(source, lambda: command, target)


def timed(source: Path, command: Callable[[], list[str]], target: Path) -> dict[str, float]:
    """Seconds until the bytes are on the disk, and the peak of all its processes' memory: private (freed with them), and resident, which
    counts pages of mapped files too.
    """
    for path in source.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command(), stdout=subprocess.DEVNULL)
    peak = {"private": 0.0, "resident": 0.0}
    watcher = threading.Thread(target=watch, args=(process.pid, peak))
    watcher.start()
    if process.wait():
        raise SystemExit(f"{command()} failed")
    subprocess.run(["sync", "-f", str(target)], check=True)
    watcher.join()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - start, "cpu": cpu, **peak}


def watch(pid: int, peak: dict[str, float]) -> None:
    while True:
        try:
            parent = psutil.Process(pid)
            if parent.status() == psutil.STATUS_ZOMBIE:
                return
            memory = [p.memory_full_info() for p in (parent, *parent.children(recursive=True))]
        except psutil.Error:
            if not psutil.pid_exists(pid):
                return
            continue
        peak["private"] = max(peak["private"], sum(m.uss for m in memory))
        peak["resident"] = max(peak["resident"], sum(m.rss for m in memory))
        time.sleep(0.05)


def make(folder: Path, layers: int) -> None:
    """A Hugging Face folder of a Llama with random bytes for weights, in files of at most 5 GB."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [VOCAB, HIDDEN]}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": [HIDDEN, HIDDEN] for n in "qkvo"}
        shapes |= {f"{at}mlp.{n}_proj.weight": [FFN, HIDDEN] for n in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": [HIDDEN, FFN]}
        shapes |= {f"{at}{n}_layernorm.weight": [HIDDEN] for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": [HIDDEN], "lm_head.weight": [VOCAB, HIDDEN]}
    groups: list[dict[str, list[int]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * int(np.prod(s)) for s in groups[-1].values()) + 2 * int(np.prod(shape)) > FILE:
            groups.append({})
        groups[-1][name] = shape
    noise = np.random.default_rng(0).bytes(1 << 26)
    weights = {}
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor, shape in group.items():
            begin, end = end, end + 2 * int(np.prod(shape))
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            weights[tensor] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            while end:
                end -= file.write(noise[: min(end, len(noise))])
            file.flush()
            os.fsync(file.fileno())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))


if __name__ == "__main__":
    run_tool(app)
