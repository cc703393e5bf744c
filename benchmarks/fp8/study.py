"""What FP8 costs in loss, whether learning rates carry over to other widths, what casts lose under each activation.

    python -m benchmarks.fp8.study quality      # fp32, bf16, FP8 and FP8 without its loss scale, three seeds
    python -m benchmarks.fp8.study transfer --steps 200 --batch 4 --seeds 1  # best rate at widths 64 … 512, unit-scaled and not
    python -m benchmarks.fp8.study activations  # zeros after the cast at the input of FFN-down

each with `--processes 2`; `--steps`, `--seeds`, `--widths` make them larger. Runs that are in the results already are kept. The corpus
is the quickstart's text in 512 pieces (benchmarks/depth/study.py says how to make it).
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import write
from benchmarks.studies import study
from megascale.data.facts import source_facts

CONFIG = Path(__file__).parents[2] / "configs" / "mus-fp8.yaml"
RESULTS = Path(__file__).parent / "results"
PRECISIONS = {
    "fp32": ["precision.fp8=false"],
    "bf16": ["precision.fp8=false", "precision.compute=bf16"],
    "fp8": ["precision.compute=bf16"],
    "fp8 without loss scale": ["precision.compute=bf16", "precision.loss_scale=1"],
}
# Rates around the best of width 64, in steps of two.
RATES = {"mus": [2.0**-i for i in (7, 6, 5, 4, 3, 2, 1)], "standard": [2.0**-i for i in (12, 11, 10, 9, 8, 7, 6)]}
STANDARD = ["model.residual=pre", "optim.base_width=null", "optim.independent_decay=false", "optim.weight_decay=0"]


def quality(args: argparse.Namespace, common: list[str]) -> None:
    runs = {
        f"{name} seed {seed}": [*common, *words, f"run.seed={seed}", f"train.eval_every={args.steps}", "train.eval_steps=32"]
        for seed in args.seeds
        for name, words in PRECISIONS.items()
    }
    found = study(RESULTS / "quality-runs.json", facts(args), CONFIG, runs, args.processes)
    valid = {name: [found[f"{name} seed {seed}"]["valid"] for seed in args.seeds] for name in PRECISIONS}
    base = statistics.mean(valid["bf16"])
    summary: dict[str, Any] = {
        name: {"valid": v, "mean": statistics.mean(v), "spread": max(v) - min(v), "gap_to_bf16": statistics.mean(v) - base}
        for name, v in valid.items()
    }
    for name in ("fp8", "fp8 without loss scale"):
        casts = found[f"{name} seed {args.seeds[0]}"]["casts"]
        summary[name]["gradient_vanished"] = statistics.mean(casts["gradient_vanished"])
        summary[name]["input_vanished"] = statistics.mean(casts["input_vanished"])
        summary[name]["clamped"] = max(max(casts[f"{c}_clamped"]) for c in ("input", "weight", "gradient"))
    write(__file__, "quality", facts(args) | {"by_precision": summary})


def transfer(args: argparse.Namespace, common: list[str]) -> None:
    runs: dict[str, list[str]] = {}
    for width in args.widths:
        shape = [f"model.hidden_size={width}", f"model.ffn_size={4 * width}", f"model.num_heads={width // 32}", "optim.base_width=64"]
        for scheme, rates in RATES.items():
            words = [*common, *shape, "precision.fp8=false", *(STANDARD if scheme == "standard" else []), "train.eval_every=0"]
            for lr, seed in itertools.product(rates, args.seeds):
                runs[f"{scheme} {width} lr {lr:g} seed {seed}"] = [*words, f"optim.lr={lr}", f"run.seed={seed}"]
    found = study(RESULTS / "transfer-runs.json", facts(args), CONFIG, runs, args.processes)

    def loss(scheme: str, width: int, lr: float) -> float:
        return statistics.mean(found[f"{scheme} {width} lr {lr:g} seed {seed}"]["last"] for seed in args.seeds)

    table = {s: {w: {f"{lr:g}": loss(s, w, lr) for lr in RATES[s]} for w in args.widths} for s in RATES}
    best = {s: {w: min(losses, key=lambda lr: losses[lr]) for w, losses in by_width.items()} for s, by_width in table.items()}
    between = {s: {w: lowest(losses) for w, losses in by_width.items()} for s, by_width in table.items()}
    write(__file__, args.name, facts(args) | {"seeds": args.seeds, "last_loss": table, "best_lr": best, "log2_of_lowest": between})
    if args.draw:
        draw(table, args.draw)


def lowest(losses: dict[str, float]) -> float | None:
    """log2 of the rate where a parabola through the best point and its neighbours is lowest; None where the best is at an end."""
    points = sorted((math.log2(float(lr)), loss) for lr, loss in losses.items())
    i = min(range(len(points)), key=lambda i: points[i][1])
    if i in (0, len(points) - 1):
        return None
    (x, left), here, right = points[i - 1], points[i][1], points[i + 1][1]
    return round(x + 1 + (left - right) / (2 * (left - 2 * here + right)), 2)


def draw(table: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    titles = {"mus": "unit-scaled: rate × √(64/width) on hidden matrices", "standard": "standard: pre-norm, init 0.02"}
    for axes, (scheme, by_width) in zip(panels, table.items()):
        for number, (width, losses) in enumerate(by_width.items()):
            points = [(float(lr), loss) for lr, loss in losses.items() if loss < 20]
            axes.plot(*zip(*points), "o-", color=f"C{number}", markersize=3.5, label=f"width {width}")
            axes.plot(*min(points, key=lambda p: p[1]), "*", color=f"C{number}", markersize=13)
        axes.set_xscale("log", base=2)
        axes.set_title(titles[scheme], fontsize=10)
        axes.set_xlabel("learning rate (star: best)")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("loss of the last tenth")
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def activations(args: argparse.Namespace, common: list[str]) -> None:
    kinds = ("relu", "gelu", "swiglu")
    runs = {f"{kind}": [*common, f"model.ffn={kind}", "precision.compute=bf16", "train.eval_every=0", "run.seed=1"] for kind in kinds}
    found = study(RESULTS / "activation-runs.json", facts(args), CONFIG, runs, args.processes)
    table = {}
    for kind in kinds:
        casts = found[kind]["casts"]
        down = [casts["input_vanished"][i] for i, part in enumerate(casts["parts"]) if part == "ffn.down"]
        table[kind] = {"input_of_down_vanished": statistics.mean(down), "last_loss": found[kind]["last"]}
    write(__file__, "activations", facts(args) | {"by_activation": table})


def facts(args: argparse.Namespace) -> dict[str, Any]:
    return {"steps": args.steps, "batch": args.batch, "blocks": 4, "unigram_entropy": source_facts(args.data).get("unigram_entropy")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["quality", "transfer", "activations"])
    parser.add_argument("--data", default="data/stdlib512", help="prefix of token files")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 128 tokens in a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--name", default="transfer", help="of transfer's file with the results")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--draw", type=Path, default=None)
    args = parser.parse_args()
    common = [f"train.steps={args.steps}", f"optim.warmup_steps={args.steps // 10}", f"data.train={args.data}", "precision.fp8_watch=100"]
    common += [f"train.global_batch_size={args.batch}", f"train.micro_batch_size={args.batch}"]
    {"quality": quality, "transfer": transfer, "activations": activations}[args.part](args, common)


if __name__ == "__main__":
    main()
