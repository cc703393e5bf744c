"""Sharding across a slow link, side by side in one run: layered, depth-first, HSDP, layered inside HSDP, DeepSpeed's ZeRO-3.

`python -m benchmarks.layered.two_hosts [--per-host 1|2] [--micro-batch N] [--steps N] [--mbit 100 300 1000]` as root on Linux.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, write
from benchmarks.layered import hosts
from benchmarks.layered.worker import MODEL, SEQ, M, settings
from megascale.config.schema import Parallel
from megascale.measure.compute import flops_per_token, gemm_rate
from megascale.model.decoder import Decoder
from megascale.model.shape import Shape
from megascale.model.spec import specs_of

COLORS = {"layered": "#2a7f62", "depth-first": "#b5304f", "HSDP": "#4c78a8", "layered in HSDP": "#54a24b", "DeepSpeed ZeRO-3": "#f58518"}


def measure(per_host: int, micro_batch: int, steps: int, bandwidths: list[int]) -> dict[str, Any]:
    ranks = 2 * per_host
    words = [str(ranks), str(micro_batch), str(steps), "-", *map(str, bandwidths)]
    with hosts.two_hosts() as names:
        running = [
            hosts.start(names[r // per_host], "benchmarks.layered.worker", [str(r), *words], {"LOCAL_RANK": str(r % per_host)})
            for r in range(ranks)
        ]
        outputs = [process.communicate()[0] for process in running]
    return json.loads(outputs[0].strip().splitlines()[-1])  # type: ignore[no-any-return]


def predicted(per_host: int, micro_batch: int, compute_seconds: float) -> dict[str, float]:
    """Mbit/s from which computation hides traffic: bytes that leave a host in a step ÷ seconds of computation.

    Layered and depth-first: (2·b_w + b_g) bytes per parameter, once per step or per micro-batch; replicas across the link 2·b_g ÷ shards of
    a host, from every rank (parameters in fp32, ring exchanges, one ring edge leaves a host).
    """
    config = settings(Parallel(), 1, micro_batch)
    specs = specs_of(Decoder(config.model, Shape(SEQ, torch.float32, torch.float32)))
    weights, ranks = 4 * sum(s.numel for s in specs.values()), 2 * per_host
    once = 3 * weights * (ranks - 1) / ranks
    sent = {"layered": once, "depth-first": M * once, "HSDP": weights, "layered in HSDP": weights, "DeepSpeed ZeRO-3": M * once}
    return {name: 8e-6 * size / compute_seconds for name, size in sent.items()}


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes: Any = figure.subplots()
    bandwidths = [float(b) for b in next(iter(result["modes"].values()))["relative_speed"] if b != "unlimited"]
    grid = [min(bandwidths) / 3 * 1.15**i for i in range(60) if min(bandwidths) / 3 * 1.15**i < max(bandwidths) * 3]
    for name, mode in result["modes"].items():
        points = [(float(b), v) for b, v in mode["relative_speed"].items() if b != "unlimited"]
        axes.plot(
            *zip(*points), "o-", color=COLORS[name], label=f"{name} ({mode['tokens_per_second']['unlimited']:,.0f} tokens/s unlimited)"
        )
        need = mode["predicted_mbit"]
        axes.plot(grid, [min(1.0, b / need) for b in grid], ":", color=COLORS[name], linewidth=1)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("Mbit/s between the two hosts, each way (dotted: were all traffic hidden behind computation)")
    axes.set_ylabel("speed, share of the unlimited")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"{result['ranks']} ranks on 2 hosts, {result['parameters'] / 1e6:.1f}M parameters in fp32, m = {M}", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-host", type=int, default=1, choices=[1, 2])
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--mbit", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--draw", type=Path, default=None)
    args = parser.parse_args()
    measured = measure(args.per_host, args.micro_batch, args.steps, args.mbit)
    config = settings(Parallel(), 1, args.micro_batch)
    specs = specs_of(Decoder(config.model, Shape(SEQ, torch.float32, torch.float32)))
    tokens = args.micro_batch * M * 2 * args.per_host * SEQ
    median = {n: {b: statistics.median(s) for b, s in mode["seconds"].items()} for n, mode in measured.items()}
    needs = predicted(args.per_host, args.micro_batch, median["layered"]["unlimited"])
    result = {
        "machine": machine() | {"threads": 1},
        "gemm_flops_two_threads": gemm_rate(torch.device("cpu"), torch.float32),
        "model": MODEL,
        "parameters": sum(s.numel for s in specs.values()),
        "flops_per_step": tokens * flops_per_token(config.model, specs, SEQ),
        "ranks": 2 * args.per_host,
        "micro_batches": M,
        "tokens_per_step": tokens,
        "modes": {
            name: {
                "seconds": mode["seconds"],
                "sent_bytes_of_rank_0": mode["sent_bytes"],
                "tokens_per_second": {b: tokens / s for b, s in median[name].items()},
                "relative_speed": {b: median[name]["unlimited"] / s for b, s in median[name].items()},
                "predicted_mbit": needs[name],
            }
            for name, mode in measured.items()
        },
        "fastest": {b: max(median, key=lambda n: -median[n][b]) for b in next(iter(median.values()))},
    }
    write(__file__, f"two_hosts_{args.per_host}", result)
    if args.draw:
        draw(result, args.draw)


if __name__ == "__main__":
    main()
