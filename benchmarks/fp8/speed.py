"""Tokens/s of FP8 with static scales, of bf16 and of FP8 with measured scales (torchao) for one shape, taking turns on one GPU.

`python -m benchmarks.fp8.speed [--hidden 2048 4096]` on a device with FP8 products (Hopper, Ada or newer); the models have about 1.2B and
2.3B parameters. Beside the ratio stands Amdahl's bound: what it would be if hidden products took half their time and all else the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.common import in_turn, machine, write
from benchmarks.one_process.throughput import our_step
from megascale.config.schema import Model
from megascale.measure.compute import peak_flops
from megascale.model.layers import Fp8
from megascale.parallel.model import ParallelModel
from megascale.parallel.precision import multiply_in_fp8

SEQ, BATCH, VOCAB = 4096, 4, 32768
LAYERS = {2048: 20, 4096: 8}
TINY = {"num_layers": 1, "hidden_size": 64, "num_heads": 1, "ffn_size": 256, "vocab_size": 256}


def shape(hidden: int, residual: str) -> Model:
    sizes = {"num_layers": LAYERS[hidden], "hidden_size": hidden, "num_heads": hidden // 128, "ffn_size": 4 * hidden, "vocab_size": VOCAB}
    return Model.model_validate({**sizes, "ffn": "gelu", "residual": residual})


def kernels(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one step by kernel, the longest two dozen; none without a device."""
    if not torch.cuda.is_available():
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    found = sorted(profiler.key_averages(), key=lambda e: -e.device_time_total)[:24]
    return {e.key[:100]: e.device_time_total / 1000 for e in found}


def compare(hidden: int, rounds: int) -> dict[str, Any]:
    """One model after the other, as a card does not hold both with their optimizers; each in its ways in turn, bf16 among them."""
    found = {"unit-scaled": measure(shape(hidden, "mus"), torch.device("cuda"), SEQ, {"bf16": "false", "static": "static"}, rounds)}
    if importlib.util.find_spec("torchao") is not None:
        dynamic: dict[str, Fp8] = {"bf16": "false", "dynamic tensorwise": "tensorwise", "dynamic rowwise": "rowwise"}
        found["pre-norm"] = measure(shape(hidden, "pre"), torch.device("cuda"), SEQ, dynamic, rounds)
    return {"layers": LAYERS[hidden], **found}


def tiny() -> dict[str, Any]:
    """One narrow layer, uncompiled, anywhere: whether it runs at all."""
    model = Model.model_validate({**TINY, "ffn": "gelu", "residual": "mus"})
    modes: dict[str, Fp8] = {"bf16": "false", "static": "static"}
    return {"layers": 1, "unit-scaled": measure(model, torch.device("cpu"), 64, modes, 1, compiled=False)}


def measure(cfg: Model, device: torch.device, seq: int, modes: dict[str, Fp8], rounds: int, compiled: bool = True) -> dict[str, Any]:
    assert cfg.vocab_size is not None
    vocab = cfg.vocab_size
    tokens = torch.randint(0, vocab, (BATCH, seq + 1), device=device)
    step, flops, model = our_step(cfg, seq, tokens, torch.bfloat16, "none", compiled=compiled)
    steps: dict[str, Callable[[], object]] = {name: partial(in_mode, model, mode, step) for name, mode in modes.items()}
    memory, by_kernel = {}, {}
    for name, run in steps.items():
        for _ in range(3):
            run()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            run()
            memory[name] = torch.cuda.max_memory_allocated()
        by_kernel[name] = kernels(run)
    measured = in_turn(steps, rounds, device, torch.bfloat16)
    seconds = {name: m["seconds"] for name, m in measured.items()}
    peak = peak_flops(device, torch.bfloat16)
    # Of all products, hidden ones by their share of the FLOPs.
    weights = sum(w.placement.spec.numel for w in model.weights if w.placement.spec.role != "embedding")
    hidden_share = 1 - vocab * cfg.hidden_size / weights
    products = sum(ms for kernel, ms in by_kernel["bf16"].items() if any(w in kernel for w in ("gemm", "nvjet", "cutlass"))) / 1000
    return {
        "parameters": sum(w.placement.spec.numel for w in model.weights),
        "tokens_per_second": {name: BATCH * seq / s for name, s in seconds.items()},
        "speed_over_bf16": {name: seconds["bf16"] / s for name, s in seconds.items() if name != "bf16"},
        "hidden_products_share_of_bf16": products * hidden_share / seconds["bf16"],
        "amdahl_bound": 1 / (1 - products * hidden_share / seconds["bf16"] / 2),
        "mfu": {name: flops / s / peak for name, s in seconds.items()},
        "peak_memory_bytes": memory,
        "kernel_milliseconds": by_kernel,
    }


def in_mode(model: ParallelModel, mode: Fp8, step: Callable[[], object]) -> None:
    for stage in model.stages:
        multiply_in_fp8(stage, mode)
    step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 4096], choices=LAYERS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--name", default="speed", help="of the file with the results")
    parser.add_argument("--tiny", action="store_true", help="one narrow layer on a CPU: whether it runs at all")
    args = parser.parse_args()
    if args.tiny:
        write(__file__, args.name, {"machine": machine(), "by_hidden_size": {TINY["hidden_size"]: tiny()}})
        return
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        sys.exit("this benchmark needs a GPU with FP8 products (compute capability 8.9 or newer), and there is none")
    write(__file__, args.name, {"machine": machine(), "by_hidden_size": {h: compare(h, args.rounds) for h in args.hidden}})


if __name__ == "__main__":
    main()
