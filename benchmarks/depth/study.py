"""Loss curves of all residual schemes side by side: same data, same budget, several learning rates and seeds.

`python -m benchmarks.depth.study --processes 2` trains 100 blocks of width 64 for 150 steps of 4 × 64 tokens: 10 schemes, 2 learning rates
and 2 seeds took 41 minutes on two cores. `--layers 1000 --steps 60 --schemes deepnorm branchnorm deepscale pre post --seeds 1 --lrs
1e-3` is the 1000-block study, half an hour of one core; `--steps`, `--width`, `--batch` and `--seq-len` enlarge it. Runs that are in the
results already are kept, so a stopped study goes on.
The corpus is the quickstart's text in 512 pieces:

    python tools/prepare_data.py "$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')" \\
        --out data/stdlib512 --vocab-size 512 --pattern '*.py'
"""

from __future__ import annotations

import argparse
import json
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write
from benchmarks.studies import last, trained
from megascale.data.facts import source_facts
from megascale.report.canvas import COLOURS, GREY, new_figure, png, style

SMOOTHED = 8  # steps
CONFIG = Path(__file__).parents[2] / "configs" / "depth-100.yaml"
SCHEMES: dict[str, list[str]] = {
    "deepnorm": [],
    "branchnorm": ["model.residual=branchnorm", "model.branchnorm_period=60"],
    "deepscale": ["model.residual=deepscale"],
    "deepscale_post": ["model.residual=deepscale_post"],
    "pre": ["model.residual=pre"],
    "post": ["model.residual=post"],
    "post_xavier": ["model.residual=branchnorm", "model.branchnorm_period=1"],
    "subln": ["model.residual=subln"],
    "layerscale": ["model.residual=layerscale"],
    "parallel": ["model.residual=parallel"],
}


def train(scheme: str, lr: float, seed: int, args: argparse.Namespace) -> list[float | None]:
    """The loss of every step; None where it is not finite, and short where training gave up."""
    overrides = [
        *SCHEMES[scheme],
        f"model.num_layers={args.layers}",
        f"model.hidden_size={args.width}",
        f"train.steps={args.steps}",
        f"train.global_batch_size={args.batch}",
        f"train.micro_batch_size={args.batch}",
        f"train.seq_len={args.seq_len}",
        "train.eval_every=0",
        f"optim.lr={lr}",
        f"optim.warmup_steps={max(1, args.steps // 10)}",
        f"run.seed={seed}",
        f"data.train={args.data}",
    ]
    return [row["loss"] for row in trained(CONFIG, overrides)]


def draw(runs: list[dict[str, Any]], entropy: float | None, title: str, path: Path) -> None:
    """A panel a rate and a curve a scheme: the mean over seeds and over SMOOTHED steps. In the legend the mean last losses."""
    rates = sorted({r["lr"] for r in runs})
    schemes = list(dict.fromkeys(r["scheme"] for r in runs))
    curves = {(s, lr): curve([r["loss"] for r in runs if (r["scheme"], r["lr"]) == (s, lr)]) for s in schemes for lr in rates}
    schemes.sort(key=lambda s: min((c[-1] for lr in rates if (c := curves[s, lr])), default=math.inf))
    with style():
        figure = new_figure(4.4 * len(rates) + 2.2, 4.2)
        panels = figure.subplots(1, len(rates), squeeze=False, sharey=True)[0]
        for axes, lr in zip(panels, rates):
            for i, scheme in enumerate(schemes):
                values = curves[scheme, lr]
                dashes = "-" if i < len(COLOURS) else (0, (4, 1.5))
                axes.plot(range(1, len(values) + 1), values, color=COLOURS[i % len(COLOURS)], linewidth=1.3, linestyle=dashes, label=scheme)
            if entropy is not None:
                axes.axhline(entropy, color=GREY, linewidth=0.9, linestyle=":")
            axes.set_title(f"lr {lr:g}", fontsize=10)
            axes.set_xlabel("step")
        panels[0].set_ylim(top=7.0)
        panels[0].set_ylabel("loss, nats a token (dotted: unigram entropy)")
        names = [f"{s}  " + " / ".join(f"{mean_last(runs, s, lr):.2f}" for lr in rates) for s in schemes]
        figure.legend(panels[0].get_lines()[: len(schemes)], names, loc="outside right center", fontsize=9)
        figure.suptitle(title, fontsize=11)
        png(figure, path)


def curve(seeds: list[list[float | None]]) -> list[float]:
    """The mean over seeds, smoothed; it ends where a seed has no finite loss."""
    means: list[float] = []
    for values in zip(*seeds):
        if any(v is None for v in values):
            break
        means.append(sum(v for v in values if v is not None) / len(values))
    return [sum(part) / len(part) for i in range(len(means)) if (part := means[max(0, i + 1 - SMOOTHED) : i + 1])]


def mean_last(runs: list[dict[str, Any]], scheme: str, lr: float) -> float:
    found = [r["last"] for r in runs if (r["scheme"], r["lr"]) == (scheme, lr)]
    return sum(found) / len(found) if found else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/stdlib512", help="prefix of token files")
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--draw", type=Path, metavar="FILE", help="PNG of the curves")
    args = parser.parse_args()
    name = f"study-{args.layers}-blocks-{args.steps}-steps"
    path = Path(__file__).parent / "results" / f"{name}.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    done = {(r["scheme"], r["lr"], r["seed"]) for r in runs}
    grid = [(s, lr, seed) for seed in args.seeds for lr in args.lrs for s in args.schemes if (s, lr, seed) not in done]
    facts = {k: v for k, v in vars(args).items() if k in ("layers", "width", "steps", "batch", "seq_len")}
    entropy = source_facts(args.data).get("unigram_entropy")
    with ProcessPoolExecutor(args.processes) as pool:
        for point, losses in zip(grid, pool.map(train, *zip(*grid), [args] * len(grid))) if grid else ():
            runs.append(dict(zip(("scheme", "lr", "seed"), point), last=last(losses), loss=[x and round(x, 4) for x in losses]))
            print(*point, f"{last(losses):.3f}", flush=True)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"machine": machine(), **facts, "unigram_entropy": entropy, "runs": runs}) + "\n")
    title = f"{args.layers} blocks of width {args.width}, {args.steps} steps of {args.batch * args.seq_len} tokens"
    if args.draw:
        draw(runs, entropy, title, args.draw)
    write(__file__, f"{name}-last", {f"{r['scheme']} lr {r['lr']:g} seed {r['seed']}": round(r["last"], 3) for r in runs})


if __name__ == "__main__":
    main()
