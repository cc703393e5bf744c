"""Whole training steps on one device: tokens/s, MFU, peak memory, kernel launches, and the lines at which the host waits.

    python -m benchmarks.gpu.step --shape 1.2b [--fp8] [--recompute selective] [--moments int8 | --muon] [--micro-batches 8 --layered]

`1.2b` is configs/llama-1.2b.yaml, `8b` eight layers of configs/llama-8b.yaml (all 32 of them need more than one GPU), `tiny` runs anywhere.
Steps are those of a run: forward, backward, clipping, AdamW. Prints its result as soon as it has one, then with what a profiler and torch's
warnings about waiting add.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import machine, next_token_batch, one_step, toy, trained
from megascale.config.load import load_config
from megascale.config.schema import Model, Optim, Parallel, Precision
from megascale.measure.compute import flops_per_token, peak_flops
from megascale.model.families import build_part
from megascale.model.shape import Shape
from megascale.model.spec import specs_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def shape(name: str) -> tuple[Model, int, int]:
    """Model, tokens per sequence, sequences per step."""
    if name == "tiny":
        return Model(num_layers=2, hidden_size=64, num_heads=4, vocab_size=256), 64, 2
    model = load_config(str(CONFIGS / f"llama-{name}.yaml")).model
    return (model, 4096, 2) if name == "1.2b" else (model.model_copy(update={"num_layers": 8}), 8192, 1)


def host_waits(step: Any, device: torch.device) -> list[str]:
    """The lines of a step at which torch warns that the host waits for the device."""
    if device.type != "cuda":
        return []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sorted({f"{Path(w.filename).name}:{w.lineno}" for w in found if "synchroniz" in str(w.message)})


def launches(step: Any, device: torch.device) -> int:
    """The number of kernels that a step launches."""
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CUDA] if device.type == "cuda" else [activity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        step()
    return sum(event.count for event in profile.key_averages())


def measure(
    name: str, device: torch.device, precision: Precision, parallel: Parallel, rounds: int, micro_batches: int, optim: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The time of a step, then the same with waits and launches: what looks for them may fail or hang."""
    fp8 = precision.fp8 != "false"
    model, seq_len, batch = shape(name)
    if fp8:  # static scales need unit-scaled residuals
        model = model.model_copy(update={"residual": "mus"})
    config = toy(model, seq_len, parallel, precision=precision, optim=Optim(independent_decay=True, weight_decay=1e-4, **optim))
    _, engine = trained(config, 1, device)
    assert model.vocab_size is not None
    drawn = [torch.randint(0, model.vocab_size, (batch, seq_len + 1), device=device) for _ in range(micro_batches)]
    batches, tokens = [next_token_batch(each) for each in drawn], micro_batches * batch * seq_len

    def step() -> None:
        one_step(engine, batches, 1 / tokens)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    begin = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - begin
    for _ in range(2):
        step()
    seconds = []
    for _ in range(rounds):
        wait()
        begin = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - begin)
    took = statistics.median(seconds)
    flops = flops_per_token(model, specs_of(build_part(model, Shape(seq_len, torch.float32, torch.float32))), seq_len)
    peak = peak_flops(device, torch.bfloat16 if precision.compute == "bf16" else torch.float32)
    found = {
        "shape": name, "tokens": tokens, "compute": precision.compute, "fp8": fp8, "compile": parallel.compile,
        "recompute": parallel.recompute, "accumulation": parallel.accumulation, **optim,
        "first_step_seconds": first, "step_seconds": took, "tokens_per_second": tokens / took,
        "mfu": flops * tokens / took / peak, "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }  # fmt: skip
    yield found
    yield (found := found | {"host_waits": host_waits(step, device)})
    yield found | {"launches": launches(step, device)}


def main(
    name: Annotated[str, typer.Option("--shape", help="tiny, 1.2b or 8b")] = "tiny",
    compute: Annotated[str, typer.Option(help="bf16 or fp32")] = "bf16",
    compiled: Annotated[bool, typer.Option("--compile/--eager")] = True,
    recompute: Annotated[str, typer.Option()] = "none",
    fp8: Annotated[bool, typer.Option("--fp8", help="products in FP8 with static scales")] = False,
    moments: Annotated[str | None, typer.Option(help="of AdamW: bf16 or int8")] = None,
    muon: Annotated[bool, typer.Option("--muon", help="Muon in bf16 instead of AdamW")] = False,
    micro_batches: Annotated[int, typer.Option(help="of a step")] = 1,
    layered: Annotated[bool, typer.Option("--layered", help="layered accumulation")] = False,
    rounds: Annotated[int, typer.Option()] = 10,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    optim: dict[str, Any] = {"name": "muon", "muon_dtype": "bf16"} if muon else {"moments": moments} if moments else {}
    precision = Precision(compute=compute, fp8="static" if fp8 else "false")  # type: ignore[arg-type]
    parallel = Parallel(compile=compiled, recompute=recompute, accumulation="layered" if layered else "depth_first")  # type: ignore[arg-type]
    for result in measure(name, device, precision, parallel, rounds, micro_batches, optim):
        print(json.dumps({"machine": machine(), **result}), flush=True)


if __name__ == "__main__":
    typer.run(main)
