"""Does growing save compute? Small models grown, against the large model from scratch, at equal FLOPs with the small model's own charged.

`python -m benchmarks.growth.saving --data PREFIX` is about 45 minutes of two idle cores with `--processes 2`; `--steps`, `--width` and
`--layers` make it larger. Runs that are in the results already are kept, so a stopped study goes on. The corpus is the quickstart's in 512
pieces:

    python tools/prepare_data.py "$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')" \\
        --out data/stdlib512 --vocab-size 512 --pattern '*.py'

For each ratio (×2 and ×1.25 in width and depth) the large model is trained from scratch for C FLOPs at several learning rates; the best
one's final validation loss is the mark. A grown run trains a small model for `--share` of C, grows it, and trains the large model until
0.6, 0.8 or 1.0·C are spent in all, each budget with its own whole schedule. Rates are tuned for both on the first seed. The saving is what
is left of C at the budget where the grown run's final loss, interpolated between budgets, reaches the mark: at least 0.4 where that is the
smallest budget, and below zero where even 1.0·C does not reach it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine
from megascale.checkpoint.saver import write_checkpoint
from megascale.comm.piece import Piece
from megascale.config.identity import identity
from megascale.config.load import load_config
from megascale.config.schema import Config, Model
from megascale.expand.grow import grow, grown_config
from megascale.expand.options import GrowthOptions, Sizes
from megascale.expand.plan import plan_growth
from megascale.expand.source import open_source
from megascale.expand.stack import specs
from megascale.expand.write import Effort
from megascale.launch.ranks import RankInfo
from megascale.measure.compute import flops_per_token
from megascale.model.init import initialize
from megascale.train.setup import build_trainer

CONFIG = Path(__file__).parent / "base.yaml"
RESULTS = Path(__file__).parent / "results"
BUDGETS = (0.8, 1.0, 0.6)  # of C; rates are tuned at the first
RATES = (0.5, 1.0)  # of the large model's own best, for what was grown


@dataclass(frozen=True)
class Arm:
    """Initialization of the large model. `width` and `depth`: whether the small model is smaller in it."""

    name: str
    options: GrowthOptions | None = None  # None: overlaid on a fresh start
    width: bool = True
    depth: bool = True


ARMS = {
    2.0: (
        Arm("LEMON", GrowthOptions()),
        Arm("HyperCloning", GrowthOptions(symmetry="snr:20"), depth=False),
        Arm("G_stack", GrowthOptions(depth="stack"), width=False),
        Arm("identity depth", GrowthOptions(), width=False),
        Arm("random"),
    ),
    1.25: (
        Arm("LEMON", GrowthOptions()),
        Arm("G_stack", GrowthOptions(depth="stack"), width=False),
        Arm("identity depth", GrowthOptions(), width=False),
        Arm("random"),
    ),
}


def sizes_of(large: tuple[int, int], ratio: float, arm: Arm) -> tuple[int, int]:
    """(width, layers) of the arm's small model."""
    return round(large[0] / ratio) if arm.width else large[0], round(large[1] / ratio) if arm.depth else large[1]


def overrides(width: int, layers: int, head: int, args: argparse.Namespace) -> list[str]:
    return [
        f"model.num_layers={layers}",
        f"model.hidden_size={width}",
        f"model.num_heads={width // head}",
        f"model.num_kv_heads={width // head}",
        f"model.head_dim={head}",
        f"model.ffn_size={width * 8 // 3 // 4 * 4}",
        "model.tie_embeddings=false",
        "model.vocab_size=512",
        f"train.global_batch_size={args.batch}",
        f"train.micro_batch_size={args.batch}",
        f"train.seq_len={args.seq_len}",
        "train.eval_steps=16",
        f"data.train={args.data}",
        "data.valid_fraction=0.05",
        "run.threads=1",
        "run.device=cpu",
        "run.peak_tflops=0.05",
        "checkpoint.every=0",
    ]


def flops(model: Model, args: argparse.Namespace) -> float:
    """FLOPs of one training step."""
    return flops_per_token(model, specs(model, args.seq_len), args.seq_len) * args.batch * args.seq_len


def trained(config: Config, steps: int, lr: float, seed: int, folder: Path, init: Path | None = None) -> float:
    """The final validation loss of the run in `folder`."""
    values: dict[str, dict[str, Any]] = {
        "train": {"steps": steps, "tokens": None, "eval_every": steps},
        "optim": {"lr": lr, "warmup_steps": max(1, steps // 10), "decay_steps": None},
        "run": {"seed": seed, "dir": str(folder)},
        "checkpoint": {"init_from": None if init is None else str(init)},
    }
    changed = {section: getattr(config, section).model_copy(update=update) for section, update in values.items()}
    quiet = redirect_stdout(StringIO()), redirect_stderr(StringIO())
    with quiet[0], quiet[1], build_trainer(config.model_copy(update=changed), RankInfo()) as trainer:
        trainer.train()
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return float(next(iter(row["valid_loss"].values())))


def overlaid(source: Path, target: Path, large: Config, seed: int) -> None:
    """The small model's tensors in the first corner of a fresh large model; layers beyond its own stay fresh."""
    small = open_source(source)
    pieces = {}
    for name, spec in specs(large.model, large.train.seq_len).items():
        local = torch.empty(spec.shape)
        piece = Piece(spec.shape, (0,) * len(spec.shape), local)
        initialize(piece, name, spec, seed)
        if name in small.shapes:
            shape = small.shapes[name]
            local[tuple(slice(0, n) for n in shape)] = small.read(name, (0,) * len(shape), shape)
        pieces[f"model.{name}"] = piece
    write_checkpoint(target, 0, pieces, {"step": 0, "identity": identity(large), "config": large.plain()})


def target_sizes(m: Model) -> Sizes:
    return Sizes(m.hidden_size, m.num_heads, m.num_kv_heads, ffn_size=m.ffn_size, num_layers=m.num_layers)


def plan_of(ratio: float, name: str, args: argparse.Namespace) -> tuple[Arm, Config, Config, int]:
    """The arm, the small and the large model's config, and the small one's steps."""
    arm = next(a for a in ARMS[ratio] if a.name == name)
    large, head = shapes(ratio, args)
    full = load_config(str(CONFIG), overrides(*large, head, args))
    little = load_config(str(CONFIG), overrides(*sizes_of(large, ratio, arm), head, args))
    return arm, little, full, round(args.share * args.steps * flops(full.model, args) / flops(little.model, args))


def place_of(ratio: float, name: str, seed: int, args: argparse.Namespace) -> Path:
    return Path(args.work) / f"{ratio}-{name}-{seed}".replace(" ", "_")


def prepared(ratio: float, name: str, seed: int, lr: float, args: argparse.Namespace) -> None:
    """The arm's small model, trained and grown; kept for all of its budgets."""
    place = place_of(ratio, name, seed, args)
    if (place / "done").exists():
        return
    shutil.rmtree(place, ignore_errors=True)
    arm, little, full, small_steps = plan_of(ratio, name, args)
    loss = trained(little, small_steps, lr, seed, place / "small")
    if arm.options is None:
        overlaid(place / "small", place / "grown", full, seed)
    else:
        grow(place / "small", place / "grown", target_sizes(full.model), replace(arm.options, seed=seed), Effort(tokens=0))
    (place / "done").write_text(f"{loss}")


def grown_run(ratio: float, name: str, seed: int, rate: float, budget: float, lr: float, args: argparse.Namespace) -> dict[str, Any]:
    """One budget of one arm, from its grown model."""
    arm, little, full, small_steps = plan_of(ratio, name, args)
    place = place_of(ratio, name, seed, args)
    spent = small_steps * flops(little.model, args)
    steps = round((budget * args.steps * flops(full.model, args) - spent) / flops(full.model, args))
    config = full
    if arm.options is not None:
        opened = open_source(place / "small", check=False)
        growth = plan_growth(opened.model, opened.seq_len, target_sizes(full.model), arm.options)
        config = grown_config(opened.config, growth, arm.options)[0]
    with tempfile.TemporaryDirectory() as folder:
        final = trained(config, steps, lr * rate, seed + 100, Path(folder) / "run", place / "grown")
    return {"valid": final, "small": float((place / "done").read_text()), "small_steps": small_steps, "steps": steps}


def shapes(ratio: float, args: argparse.Namespace) -> tuple[tuple[int, int], int]:
    """((width, layers) of the large model, head size)."""
    if ratio == 2.0:
        return (args.width, args.layers), args.width // 8
    return (args.width * 10 // 8, args.layers // 4 * 5), args.width // 8


def scratch_run(ratio: float, seed: int, lr: float, args: argparse.Namespace) -> dict[str, Any]:
    large, head = shapes(ratio, args)
    with tempfile.TemporaryDirectory() as folder:
        return {"valid": trained(load_config(str(CONFIG), overrides(*large, head, args)), args.steps, lr, seed, Path(folder) / "run")}


def saving(found: dict[str, dict[str, Any]], ratio: float, arm: str, seed: int, rate: float, mark: float) -> float | None:
    """1 − the share of C at which the arm's loss, linear between budgets, meets the mark; None while runs are missing."""
    points = [(b, found.get(f"{ratio} {arm} {seed} {rate} {b}")) for b in sorted(BUDGETS)]
    if any(p is None for _, p in points):
        return None
    losses = [(b, p["valid"]) for b, p in points if p is not None]
    if losses[0][1] <= mark:
        return 1 - losses[0][0]  # at least
    for (b0, x0), (b1, x1) in itertools.pairwise(losses):
        if x1 <= mark:
            return 1 - (b0 + (b1 - b0) * (x0 - mark) / (x0 - x1))
    (b0, x0), (b1, x1) = losses[-2:]
    slope = (x0 - x1) / (b1 - b0)
    return -((x1 - mark) / slope) if slope > 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/stdlib512", help="prefix of token files")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=250, help="of the large model from scratch: C")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.25, help="of C that the small model gets")
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.0, 1.25], choices=list(ARMS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many, exit code 75; the same command goes on")
    parser.add_argument("--work", default=None, help="folder for small and grown models; a temporary one if absent")
    parser.add_argument("--draw", type=Path, default=None, help="draw what is in the results into this file, and train nothing")
    args = parser.parse_args()
    if args.draw is not None:
        path = RESULTS / f"saving-{args.width}-{args.layers}-{args.steps}.json"
        draw(json.loads(path.read_text())["runs"], args, args.draw)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.work = args.work or folder
        run_study(args)


def run_study(args: argparse.Namespace) -> None:
    path = RESULTS / f"saving-{args.width}-{args.layers}-{args.steps}.json"
    path.parent.mkdir(exist_ok=True)
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else {}
    begun = time.monotonic()
    facts = {k: v for k, v in vars(args).items() if k in ("width", "layers", "steps", "batch", "seq_len", "share")}

    def keep(name: str, result: dict[str, Any]) -> None:
        found[name] = result
        print(name, f"{result['valid']:.4f}", flush=True)
        content = {"machine": machine() | {"threads": 1}, **facts, "runs": found, "summary": summary(found, args)}
        path.write_text(json.dumps(content, indent=1) + "\n")
        if time.monotonic() - begun > 60 * args.minutes:
            pool.shutdown(wait=True, cancel_futures=True)
            raise SystemExit(75)  # run again to go on

    with ProcessPoolExecutor(args.processes) as pool:

        def all_of(jobs: dict[str, tuple[Any, ...]], work: Callable[..., dict[str, Any]]) -> None:
            running = {name: pool.submit(work, *job, args) for name, job in jobs.items() if name not in found}
            for name, future in running.items():
                keep(name, future.result())

        first = args.seeds[0]
        all_of({f"{r} scratch {first} {lr}": (r, first, lr) for r in args.ratios for lr in args.lrs}, scratch_run)
        best = {r: best_lr(found, r, args) for r in args.ratios}
        all_of({f"{r} scratch {s} {best[r]}": (r, s, best[r]) for s in args.seeds for r in args.ratios}, scratch_run)
        for seed, ratio in itertools.product(args.seeds, args.ratios):
            for arm in ARMS[ratio]:
                begin = f"{ratio} {arm.name} {seed}"
                if all(any(k.startswith(begin) and k.endswith(f" {b}") for k in found) for b in BUDGETS):
                    continue
                pool.submit(prepared, ratio, arm.name, seed, best[ratio], args).result()
                tuned = {f"{begin} {x} {BUDGETS[0]}": (ratio, arm.name, seed, x, BUDGETS[0], best[ratio]) for x in RATES}
                all_of(tuned if seed == first else {}, grown_run)
                rate = best_rate(found, ratio, arm.name, args)
                all_of({f"{begin} {rate} {b}": (ratio, arm.name, seed, rate, b, best[ratio]) for b in BUDGETS}, grown_run)


def draw(found: dict[str, dict[str, Any]], args: argparse.Namespace, path: Path) -> None:
    """Final losses by budget, means over seeds; the dashed line is the large model from scratch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    names = list(dict.fromkeys(arm.name for arms in ARMS.values() for arm in arms))
    for axes, ratio in zip(figure.subplots(1, len(args.ratios), sharey=True, squeeze=False)[0], args.ratios):
        lr = best_lr(found, ratio, args)
        marks = [found[k]["valid"] for s in args.seeds if (k := f"{ratio} scratch {s} {lr}") in found]
        axes.axhline(sum(marks) / len(marks), color="#444", linestyle="--", linewidth=1, label=f"from scratch ({len(marks)} seeds)")
        for arm in ARMS[ratio]:
            rate = best_rate(found, ratio, arm.name, args)
            points = []
            for budget in sorted(BUDGETS):
                losses = [found[k]["valid"] for s in args.seeds if (k := f"{ratio} {arm.name} {s} {rate} {budget}") in found]
                points.append((budget, sum(losses) / len(losses), len(losses)))
            color = f"C{names.index(arm.name)}"
            axes.plot(
                [p[0] for p in points], [p[1] for p in points], marker="o", color=color, label=f"{arm.name} ({min(p[2] for p in points)})"
            )
        axes.set_title(f"×{ratio:g}", fontsize=10)
        axes.set_xlabel("FLOPs, small model's included, as a share of C")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("final validation loss, nats a token")
    figure.savefig(path, dpi=110)


def best_lr(found: dict[str, dict[str, Any]], ratio: float, args: argparse.Namespace) -> float:
    return min(args.lrs, key=lambda lr: found[f"{ratio} scratch {args.seeds[0]} {lr}"]["valid"])


def best_rate(found: dict[str, dict[str, Any]], ratio: float, arm: str, args: argparse.Namespace) -> float:
    return min(RATES, key=lambda x: found[f"{ratio} {arm} {args.seeds[0]} {x} {BUDGETS[0]}"]["valid"])


def summary(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """By ratio and arm: savings by seed against that seed's scratch run, and final losses at equal FLOPs."""
    told: dict[str, Any] = {}
    for ratio in args.ratios:
        tried = [lr for lr in args.lrs if f"{ratio} scratch {args.seeds[0]} {lr}" in found]
        if len(tried) < len(args.lrs):
            continue
        lr = best_lr(found, ratio, args)
        marks = {s: found[f"{ratio} scratch {s} {lr}"]["valid"] for s in args.seeds if f"{ratio} scratch {s} {lr}" in found}
        told[f"×{ratio:g} scratch"] = {"lr": lr, "valid": marks}
        for arm in ARMS[ratio]:
            if any(f"{ratio} {arm.name} {args.seeds[0]} {x} {BUDGETS[0]}" not in found for x in RATES):
                continue
            rate = best_rate(found, ratio, arm.name, args)
            savings = {s: saving(found, ratio, arm.name, s, rate, mark) for s, mark in marks.items()}
            equal = {s: found[k]["valid"] for s in marks if (k := f"{ratio} {arm.name} {s} {rate} 1.0") in found}
            told[f"×{ratio:g} {arm.name}"] = {"rate": rate, "saving": savings, "valid at equal FLOPs": equal}
    return told


if __name__ == "__main__":
    main()
