"""Loss curves of all residual schemes side by side: same data, same budget, several learning rates and seeds.

`python -m benchmarks.depth.study --processes 2` trains 100 blocks of width 64 for 150 steps of 4 × 64 tokens: 10 schemes, 2 learning rates
and 2 seeds are about 45 minutes on two idle cores. `--layers 1000 --schemes deepnorm branchnorm deepscale pre post --seeds 1 --lrs 1e-3`
is the 1000-block study; `--steps`, `--width`, `--batch` and `--seq-len` make it larger. Runs that are in the results already are kept, so a
stopped study goes on. The corpus is the quickstart's text in 512 pieces:

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
from megascale.data.dataset import source_facts

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
    from matplotlib.figure import Figure

    rates = sorted({r["lr"] for r in runs})
    schemes = list(dict.fromkeys(r["scheme"] for r in runs))
    figure = Figure(figsize=(6.2 * len(rates), 4.6), layout="constrained")
    panels = figure.subplots(1, len(rates), squeeze=False, sharey=True)[0]
    for axes, lr in zip(panels, rates):
        for run in (r for r in runs if r["lr"] == lr):
            values = [math.nan if x is None else x for x in run["loss"]]
            color = f"C{schemes.index(run['scheme'])}"
            axes.plot(range(1, len(values) + 1), values, color=color, linewidth=1, label=f"{run['scheme']} {last(run['loss']):.2f}")
        if entropy is not None:
            axes.axhline(entropy, color="#888", linewidth=0.8, linestyle="--")
        axes.set_ylim(top=7.0)
        axes.set_title(f"lr {lr:g}", fontsize=10)
        axes.set_xlabel("step")
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=5)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("loss, nats a token (dashed: unigram entropy)")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


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
    draw(runs, entropy, title, path.with_suffix(".png"))
    write(__file__, f"{name}-last", {f"{r['scheme']} lr {r['lr']:g} seed {r['seed']}": round(r["last"], 3) for r in runs})


if __name__ == "__main__":
    main()
