#!/usr/bin/env python3
"""Does a mixture of experts learn more than a dense model of equal active parameters, and what keeps its load even?

Trains small models on the quickstart corpus, one process and one thread each: the dense one and a mixture of 8 experts of half its width,
two a token, for three seeds; then the mixture with other ways of balancing, and with none. Runs that are whole are not trained again.

    python benchmarks/experts/quality.py --data data/stdlib --folder runs/experts
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import machine, write
from megascale.config.load import build_config
from megascale.launch.ranks import RankInfo
from megascale.report.read import read_run
from megascale.train.setup import build_trainer

SEEDS = (1, 2, 3)
EXPERTS = {"num_experts": 8, "top_k": 2, "ffn_size": 192}
# Every way of balancing is tried with its published weight, and with the z-loss of all of them.
KINDS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "loss": {**EXPERTS, "balance": "loss"},
    "none": {**EXPERTS, "balance": "none"},
    "entropy": {**EXPERTS, "balance": "entropy"},
    "bias": {**EXPERTS, "balance": "bias", "router": "sigmoid"},
    "none, sigmoid": {**EXPERTS, "balance": "none", "router": "sigmoid"},
}


def settings(data: str, folder: Path, kind: str, seed: int, steps: int) -> dict[str, Any]:
    return {
        "run": {"name": "experts", "dir": str(folder / f"{kind.replace(', ', '-')}-{seed}"), "seed": seed, "threads": 1, "device": "cpu"},
        "model": {
            "num_layers": 4,
            "hidden_size": 128,
            "num_heads": 4,
            "ffn_size": 384,
            "tie_embeddings": True,
            "moe": KINDS[kind],
        },
        "train": {
            "steps": steps,
            "global_batch_size": 16,
            "micro_batch_size": 16,
            "seq_len": 128,
            "eval_every": 100,
            "eval_steps": 24,
            "log_every": 5,
        },
        "optim": {"lr": 3e-3, "warmup_steps": 20},
        "data": {"train": data, "valid_fraction": 0.02},
        "precision": {"compute": "bf16"},
    }


def train(values: dict[str, Any]) -> dict[str, Any]:
    """Trains unless the run is whole; its validation loss at the end and the load over steps (the largest layer's max ÷ mean)."""
    folder = Path(values["run"]["dir"])
    done = folder / "metrics.jsonl"
    if not done.exists() or read_run(folder).last_step < values["train"]["steps"]:
        with build_trainer(build_config(values), RankInfo(0, 1, 0, 1)) as trainer:
            trainer.train()
    rows = read_run(folder).metrics
    load = {r["step"]: max(r["experts"]["load_max_over_mean"]) for r in rows if "experts" in r}
    return {"valid_loss": next(iter(rows[-1]["valid_loss"].values())), "load": load}


def main(
    data: Annotated[str, typer.Option(help="prefix of the quickstart's tokens")] = "data/stdlib",
    folder: Annotated[Path, typer.Option(help="where the runs go")] = Path("runs/experts"),
    steps: int = 300,
) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for kind in KINDS:
        for seed in SEEDS if kind in ("dense", "loss") else SEEDS[:1]:
            found[f"{kind} {seed}"] = train(settings(data, folder, kind, seed, steps))
            print(kind, seed, found[f"{kind} {seed}"]["valid_loss"], flush=True)
    dense, sparse = ([found[f"{kind} {seed}"]["valid_loss"] for seed in SEEDS] for kind in ("dense", "loss"))
    last = {name: statistics.mean(list(r["load"].values())[-10:]) for name, r in found.items() if r["load"]}
    write(
        __file__,
        "quality",
        {
            "machine": machine(),
            "tokens": steps * 16 * 128,
            "dense_valid_loss": dense,
            "experts_valid_loss": sparse,
            "gain": [a - b for a, b in zip(dense, sparse)],
            "load_at_end": last,
            "runs": found,
        },
    )


if __name__ == "__main__":
    typer.run(main)
