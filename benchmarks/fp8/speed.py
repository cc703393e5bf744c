"""Tokens/s of FP8 with static scales, of bf16 and of FP8 with measured scales (torchao) for one shape, taking turns on one GPU.

`python -m benchmarks.fp8.speed [--hidden 2048 4096]` on a device with FP8 products (Hopper, Ada or newer); the models have about 1.2B and
2.3B parameters. Beside the ratio stands Amdahl's bound: what it would be if hidden products took half their time and all else the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import in_turn, machine, write
from benchmarks.one_process.throughput import our_step
from megascale.config.schema import Model
from megascale.measure.compute import peak_flops
from megascale.model.layers import Fp8

SEQ, BATCH, VOCAB = 4096, 2, 32768
LAYERS = {2048: 20, 4096: 8}


def shape(hidden: int, residual: str) -> Model:
    sizes = {"num_layers": LAYERS[hidden], "hidden_size": hidden, "num_heads": hidden // 128, "ffn_size": 4 * hidden, "vocab_size": VOCAB}
    return Model.model_validate({**sizes, "ffn": "gelu", "residual": residual})


def kernels(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one step by kernel, the longest twenty."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    found = sorted(profiler.key_averages(), key=lambda e: -e.device_time_total)[:20]
    return {e.key[:100]: e.device_time_total / 1000 for e in found}


def compare(hidden: int, rounds: int) -> dict[str, Any]:
    device = torch.device("cuda")
    ways: dict[str, tuple[str, Fp8]] = {"bf16": ("mus", "false"), "static": ("mus", "static")}
    if importlib.util.find_spec("torchao") is not None:
        ways |= {"llama bf16": ("pre", "false"), "dynamic tensorwise": ("pre", "tensorwise"), "dynamic rowwise": ("pre", "rowwise")}
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ + 1), device=device)
    steps, memory, by_kernel, flops = {}, {}, {}, 0.0
    for name, (residual, fp8) in ways.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps[name], flops = our_step(shape(hidden, residual), SEQ, tokens, torch.bfloat16, "none", fp8)
        for _ in range(3):
            steps[name]()
        memory[name] = torch.cuda.max_memory_allocated() - before
        by_kernel[name] = kernels(steps[name])
    measured = in_turn(steps, rounds, device, torch.bfloat16)
    seconds = {name: m["seconds"] for name, m in measured.items()}
    products = sum(ms for kernel, ms in by_kernel["bf16"].items() if any(w in kernel for w in ("gemm", "nvjet", "cutlass"))) / 1000
    peak = peak_flops(device, torch.bfloat16)
    return {
        "layers": LAYERS[hidden],
        "tokens_per_second": {name: BATCH * SEQ / s for name, s in seconds.items()},
        "static_over_bf16": seconds["bf16"] / seconds["static"],
        "amdahl_bound": 1 / (1 - products / seconds["bf16"] / 2),
        "mfu": {name: flops / s / peak for name, s in seconds.items()},
        "peak_memory_bytes": memory,
        "kernel_milliseconds": by_kernel,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 4096], choices=LAYERS)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        sys.exit("this benchmark needs a GPU with FP8 products (compute capability 8.9 or newer), and there is none")
    write(__file__, "speed", {"machine": machine(), "by_hidden_size": {h: compare(h, args.rounds) for h in args.hidden}})


if __name__ == "__main__":
    main()
