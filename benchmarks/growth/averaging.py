"""How much of what a decay gains do averages of the constant phase recover?

A small decoder on the quickstart corpus, three seeds. All numbers are validation losses after the same number of tokens: the trunk at its
constant rate, the mean of its last N checkpoints (`megascale merge`), averages that it kept (`optim.ema`), and a branch that decayed over
the last STEPS − DECAY_FROM steps (`megascale branch`). An average recovers (trunk − average) ÷ (trunk − decayed).

    python -m benchmarks.growth.averaging data/stdlib WORK         # `make quickstart` prepares the corpus; half an hour of one core
    python -m benchmarks.growth.averaging --draw docs/averages.png
    python -m benchmarks.growth.averaging --cost                   # in processor time of a step: seconds
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, next_token_batch, toy, write
from benchmarks.common import trained as drawn
from megascale.checkpoint.trunk import branch
from megascale.config.load import build_config, load_config
from megascale.config.schema import Config, Model, Optim
from megascale.expand.merge import last_of, merge
from megascale.expand.write import Effort
from megascale.launch.ranks import RankInfo
from megascale.report.canvas import COLOURS, GREY, new_figure, png, style
from megascale.train.engines.engine import backward, update
from megascale.train.faults.stop import StopFlag
from megascale.train.faults.watchdog import Activity
from megascale.train.growing import trainers
from megascale.train.setup import build_trainer

RESULTS = Path(__file__).parent / "results" / "averaging.json"
SEEDS = (1, 2, 3)
STEPS, DECAY_FROM, EVERY = 2200, 1760, 40
MERGED = (2, 4, 8, 12)  # checkpoints, EVERY steps apart
AVERAGES = (0.98, 0.99, 0.995, 0.998)
CONFIG: dict[str, Any] = {
    "run": {"threads": 1, "device": "cpu", "peak_tflops": 0.05},
    "model": {"num_layers": 3, "hidden_size": 96, "num_heads": 4, "ffn_size": 256, "tie_embeddings": True},
    "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 8, "seq_len": 128, "eval_every": STEPS, "eval_steps": 48},
    "optim": {"lr": 4e-3, "warmup_steps": 100, "decay": "constant", "ema": list(AVERAGES)},
    "data": {"train": "", "valid_fraction": 0.02},
    "checkpoint": {"every": EVERY, "keep_last": max(MERGED)},
}
DECAY = ["optim.decay=1-sqrt", "optim.min_lr_ratio=0", f"train.steps={STEPS}", "optim.ema=[]"]


def trained(config: Config) -> dict[str, float]:
    """The validation losses of a run's last step, by name."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()), trainers(config, RankInfo(), StopFlag(), Activity()) as phases:
        for trainer in phases:
            trainer.train()
    rows = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return {name.partition(" ema ")[2] or "weights": loss for name, loss in rows[-1]["valid_loss"].items()}


def measured(values: dict[str, Any], weights: Path, folder: Path) -> float:
    """The validation loss of the weights in a checkpoint."""
    changed = {**values, "run": {**values["run"], "dir": str(folder)}, "checkpoint": {"init_from": str(weights)}}
    changed["optim"] = {**values["optim"], "ema": []}
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()), build_trainer(build_config(changed), RankInfo()) as trainer:
        return next(iter(trainer.evaluate().values()))


def of_seed(seed: int, prefix: str, work: Path) -> dict[str, Any]:
    trunk = work / f"trunk-{seed}"
    values = {**CONFIG, "run": {**CONFIG["run"], "dir": str(trunk), "seed": seed}, "data": {**CONFIG["data"], "train": prefix}}
    of_trunk = trained(build_config(values))
    found: dict[str, Any] = {"trunk": of_trunk.pop("weights"), "ema": of_trunk, "merged": {}}
    for number in MERGED:
        target = work / f"merged-{seed}-{number}"
        merge(last_of(trunk, number, None), target, None, Effort(check=False))
        found["merged"][str(number)] = measured(values, target, work / f"measured-{seed}-{number}")
    made = branch(trunk, DECAY_FROM, work / f"decay-{seed}", DECAY)
    found["decayed"] = trained(load_config(made["config"]))["weights"]
    for folder in work.glob(f"*-{seed}*"):
        shutil.rmtree(folder)
    return found


def recovered(found: dict[str, Any], loss: float) -> float:
    return (found["trunk"] - loss) / (found["trunk"] - found["decayed"])


def summary(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By average: the mean share of the decay's gain that it recovers, with the lowest and highest seed."""
    shares: dict[str, Any] = {}
    for kind in ("merged", "ema"):
        for name in next(iter(seeds.values()))[kind]:
            each = [recovered(found, found[kind][name]) for found in seeds.values()]
            shares[f"{kind} {name}"] = [round(x, 3) for x in (statistics.mean(each), min(each), max(each))]
    gains = [found["trunk"] - found["decayed"] for found in seeds.values()]
    return {"decay_gains": [round(x, 4) for x in gains], "recovered": shares}


def cost(rounds: int = 30) -> dict[str, Any]:
    """Milliseconds of processor time of a step of the study's model, of its update, and of following one average, medians in turn."""
    model = Model(**CONFIG["model"], vocab_size=8192)
    batch = next_token_batch(torch.randint(0, 8192, (8, 129), generator=torch.Generator().manual_seed(0)))
    one, good = torch.ones((), dtype=torch.float64), torch.tensor(True)
    times: dict[str, list[float]] = {}
    engines: dict[str, Any] = {}
    for name, optim in {"adamw": Optim(ema=0.999), "schedule_free": Optim(name="schedule_free", decay="constant")}.items():  # type: ignore[arg-type]
        engines[name] = drawn(toy(model, 128, optim=optim), 1, torch.device("cpu"))[1]
    (average,) = engines["adamw"].optimizer.kept.values()
    updates = {"adamw": engines["adamw"].optimizer.inner, "schedule_free": engines["schedule_free"].optimizer}
    for round_ in range(rounds + 1):
        for name, engine in engines.items():
            begin = time.process_time()
            sums = backward(engine, [batch], 1 / batch.valid, 1e-4)
            middle = time.process_time()
            updates[name].step(1e-4, one, good)
            end = time.process_time()
            update(engine, sums)
            if round_:  # the first one fills memory
                times.setdefault(f"{name}: forward and backward", []).append(middle - begin)
                times.setdefault(f"{name}: update", []).append(end - middle)
        begin = time.process_time()
        average.follow(good)
        times.setdefault("one average", []).append(time.process_time() - begin)
    found = {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
    step = found["adamw: forward and backward"] + found["adamw: update"]
    shares = {"one average": found["one average"] / step, "schedule_free": (found["schedule_free: update"] - found["adamw: update"]) / step}
    return {
        "machine": machine(),
        "milliseconds": {name: round(ms, 2) for name, ms in found.items()},
        "more_than_adamw": {name: round(share, 4) for name, share in shares.items()},
    }


def draw(path: Path) -> None:
    kept = json.loads(RESULTS.read_text())
    seeds = list(kept["seeds"].values())
    columns = [("trunk", [f["trunk"] for f in seeds], GREY)]
    columns += [(f"last {n}\nmerged", [f["merged"][str(n)] for f in seeds], COLOURS[0]) for n in MERGED]
    columns += [(f"EMA\n{d}", [f["ema"][str(d)] for f in seeds], COLOURS[2]) for d in AVERAGES]
    columns += [("decayed", [f["decayed"] for f in seeds], COLOURS[1])]
    with style():
        figure = new_figure(8.4, 3.6)
        axes = figure.subplots()
        for place, (_, losses, colour) in enumerate(columns):
            axes.plot([place] * len(losses), losses, "o", color=colour, alpha=0.55, markersize=5)
            axes.plot([place - 0.28, place + 0.28], [statistics.mean(losses)] * 2, color=colour, linewidth=2)
        level = statistics.mean(f["trunk"] - 0.7 * (f["trunk"] - f["decayed"]) for f in seeds)
        axes.axhline(level, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate("70 % of the decay's gain", (-0.7, level), ha="left", va="bottom", color=GREY, fontsize=9)
        axes.set_xlim(-0.75, len(columns) - 0.25)
        axes.set_xticks(range(len(columns)), [name for name, _, _ in columns], fontsize=9)
        axes.set_ylabel("validation loss")
        axes.grid(axis="x", visible=False)
        png(figure, path)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="?", help="prepared tokens of the corpus")
    parser.add_argument("work", nargs="?", type=Path, help="folder for the runs, 300 MB")
    parser.add_argument("--draw", type=Path, help="draw the results instead")
    parser.add_argument("--cost", action="store_true", help="time a step with and without averages instead")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.cost:
        write(__file__, "averaging-cost", cost())
        return
    if asked.draw is not None:
        draw(asked.draw)
        return
    if asked.prefix is None or asked.work is None:
        parser.error("give the prefix of the corpus and a work folder")
    seeds: dict[str, Any] = json.loads(RESULTS.read_text())["seeds"] if RESULTS.exists() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    for seed in SEEDS:
        if str(seed) in seeds:
            continue
        seeds[str(seed)] = of_seed(seed, asked.prefix, asked.work)
        facts = {"machine": machine(), "config": CONFIG, "decay": {"from": DECAY_FROM, "changes": DECAY}}
        RESULTS.write_text(json.dumps({**facts, "seeds": seeds, **summary(seeds)}, indent=1) + "\n")
        print(seed, json.dumps(seeds[str(seed)]), flush=True)
    print(json.dumps(summary(seeds), indent=1))


if __name__ == "__main__":
    main()
