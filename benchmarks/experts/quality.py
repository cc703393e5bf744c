"""Does a mixture of experts learn more than a dense model of equal active parameters, and what keeps its load even?

Trains small models on the quickstart corpus, one process and one thread each: a dense one and a mixture of 8 experts of half its width,
two a token, for every seed; then a wider mixture under every way of balancing, and under none. Runs that are whole are not trained again.

    python -m benchmarks.experts.quality --data data/stdlib --folder runs/experts --processes 2
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import machine, write
from megascale.config.load import build_config
from megascale.launch.ranks import RankInfo
from megascale.report.canvas import COLOURS, GREY, new_figure, png, style
from megascale.report.read import read_run
from megascale.train.setup import build_trainer

# Every way of balancing is tried with its published weight, and with the z-loss added; the entropy with ten times its weight as well.
BALANCES: dict[str, dict[str, Any]] = {
    "loss": {"balance": "loss"},
    "entropy": {"balance": "entropy"},
    "entropy-0.1": {"balance": "entropy", "aux_loss": 0.1},
    "bias": {"balance": "bias", "router": "sigmoid"},
    "none": {"balance": "none"},
}


def settings(
    data: str, folder: Path, name: str, seed: int, width: int, ffn: int, lr: float, steps: int, warmup: int, balance: str | None
) -> dict[str, Any]:
    """A run of 4 layers of `width`; `ffn` channels meet a token, dense or (with `balance`) as two of eight experts."""
    moe = None if balance is None else {"num_experts": 8, "top_k": 2, "ffn_size": ffn // 2, **BALANCES[balance]}
    return {
        "run": {"name": "experts", "dir": str(folder / name), "seed": seed, "threads": 1, "device": "cpu"},
        "model": {"num_layers": 4, "hidden_size": width, "num_heads": 4, "ffn_size": ffn, "tie_embeddings": True, "moe": moe},
        "train": {
            "steps": steps,
            "global_batch_size": 16,
            "micro_batch_size": 16,
            "seq_len": 128,
            "eval_every": steps // 5,
            "eval_steps": 24,
            "log_every": 5,
        },
        "optim": {"lr": lr, "warmup_steps": warmup},
        "data": {"train": data, "valid_fraction": 0.02},
        "precision": {"compute": "bf16"},
    }


def train(values: dict[str, Any]) -> dict[str, Any]:
    """Trains unless the run is whole; its validation losses and the load over steps (max ÷ mean of every layer)."""
    torch.set_num_threads(1)
    folder = Path(values["run"]["dir"])
    if not (folder / "metrics.jsonl").exists() or read_run(folder).last_step < values["train"]["steps"]:
        with build_trainer(build_config(values), RankInfo(0, 1, 0, 1)) as trainer:
            trainer.train()
    rows = read_run(folder).metrics
    losses = {r["step"]: next(iter(r["valid_loss"].values())) for r in rows if "valid_loss" in r}
    return {"valid_loss": losses, "load": {r["step"]: r["experts"]["load_max_over_mean"] for r in rows if "experts" in r}}


def draw(curves: dict[str, dict[int, float]], load: dict[str, dict[int, list[float]]], picture: Path) -> None:
    """Left the validation losses of every seed, right the busiest expert of the least even layer."""
    with style():
        figure = new_figure(9.6, 3.2)
        left, right = figure.subplots(1, 2)
        for name, curve in curves.items():
            kind, _, seed = name.rpartition("-")
            colour = COLOURS[("dense", "experts").index(kind)]
            left.plot(list(curve), list(curve.values()), "o-", color=colour, markersize=3, label=kind if seed == "1" else None)
        left.set_title("validation loss, equal active parameters", fontsize=10)
        for (name, found), colour in zip(load.items(), COLOURS):
            right.plot(list(found), [max(layers) for layers in found.values()], color=colour, label=name)
        right.axhline(1.5, color=GREY, linewidth=0.9, linestyle=":")
        right.set_ylim(1, None)
        right.set_title("load, max ÷ mean, of the least even layer, by balance", fontsize=10)
        for axes, top in ((left, 1.0), (right, 0.93)):
            axes.set_xlabel("step")
            axes.legend(fontsize=9, loc="upper right", bbox_to_anchor=(1, top))
        png(figure, picture)


def main(
    data: Annotated[str, typer.Option(help="prefix of the quickstart's tokens")] = "data/stdlib",
    folder: Annotated[Path, typer.Option(help="where the runs go")] = Path("runs/experts"),
    seeds: int = 3,
    steps: int = 1200,
    load_steps: int = 300,
    warmup: Annotated[int, typer.Option(help="steps; after 20 a mixture's first spike decides how it ends")] = 100,
    processes: int = 1,
    picture: Annotated[Path | None, typer.Option(help="PNG of the curves")] = None,
) -> None:
    asked = {
        f"{name}-{seed}": settings(data, folder, f"{name}-{seed}", seed, 64, 128, 5e-3, steps, warmup, balance)
        for seed in range(1, seeds + 1)
        for name, balance in (("dense", None), ("experts", "loss"))
    }
    asked |= {f"load-{b}": settings(data, folder, f"load-{b}", 1, 128, 384, 3e-3, load_steps, 20, b) for b in BALANCES}
    with ProcessPoolExecutor(processes) as pool:
        found = dict(zip(asked, pool.map(train, asked.values())))
    curves = {name: run["valid_loss"] for name, run in found.items() if not name.startswith("load-")}
    quality = {kind: [curves[f"{kind}-{seed}"][steps] for seed in range(1, seeds + 1)] for kind in ("dense", "experts")}
    load = {b: found[f"load-{b}"]["load"] for b in BALANCES}
    if picture:
        draw(curves, load, picture)
    write(
        __file__,
        "quality",
        {
            "machine": machine(),
            "tokens": steps * 16 * 128,
            "warmup": warmup,
            "valid_loss": quality,
            "gain": [dense - sparse for dense, sparse in zip(*quality.values())],
            "curves": curves,
            "load_at_end": {b: max(found[max(found)]) for b, found in load.items()},
            "load": load,
        },
    )


if __name__ == "__main__":
    typer.run(main)
