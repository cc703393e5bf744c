"""Weight subcloning: steps to a loss from a cut-down teacher against a random start, and importance against random and reversed ranking.

`python -m benchmarks.growth.subcloning --data PREFIX`: a teacher (width 96, 4 layers) is trained, cut to three quarters of its channels,
half of its feed-forward, and 3 layers, and each student trains on. Same corpus as saving.py. Minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.growth.saving import CONFIG, overrides
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.expand.shrink import shrink
from megascale.expand.smaller import Smaller
from megascale.expand.write import Effort
from megascale.launch.ranks import RankInfo
from megascale.train.setup import build_trainer

SIZES = Smaller(hidden_size=72, ffn_size=128, num_layers=3)


def curve(config: Config, steps: int, lr: float, seed: int, folder: Path, init: Path | None, every: int) -> list[tuple[int, float]]:
    """(step, validation loss) of a run; step 0 is the start, if it was evaluated."""
    values: dict[str, dict[str, Any]] = {
        "train": {"steps": steps, "tokens": None, "eval_every": every},
        "optim": {"lr": lr, "warmup_steps": max(1, steps // 20)},
        "run": {"seed": seed, "dir": str(folder)},
        "checkpoint": {"init_from": None if init is None else str(init)},
    }
    changed = {section: getattr(config, section).model_copy(update=update) for section, update in values.items()}
    quiet = redirect_stdout(StringIO()), redirect_stderr(StringIO())
    with quiet[0], quiet[1], build_trainer(config.model_copy(update=changed), RankInfo()) as trainer:
        begin = 0.0 if init is None else next(iter(trainer.evaluate().values()))
        trainer.train()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [(r["step"], next(iter(r["valid_loss"].values()))) for r in rows if r.get("valid_loss")]
    return [(0, begin), *found] if begin else found


def steps_to(loss: float, points: list[tuple[int, float]]) -> int | None:
    return next((step for step, value in points if value <= loss), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/stdlib512")
    parser.add_argument("--teacher-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=64)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine() | {"threads": 1}, **{k: v for k, v in vars(args).items() if k != "data"}, "seeds": {}}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            teacher = load_config(str(CONFIG), overrides(96, 4, 12, args))
            reached = curve(teacher, args.teacher_steps, args.lr, seed, work / "teacher", None, args.teacher_steps)[-1][1]
            told: dict[str, Any] = {"teacher": reached}
            student = None
            for ranking in ("importance", "random", "reversed"):
                report = shrink(work / "teacher", work / ranking, SIZES, ranking, seed, Effort(tokens=2048))
                student = load_config(str(work / ranking / "config.yaml"))
                points = curve(student, args.steps, args.lr, seed + 100, work / f"run-{ranking}", work / ranking, 10)
                told[ranking] = {"layers": report["kept"]["layers"], "points": points}
            assert student is not None
            told["fresh"] = {"points": curve(student, args.steps, args.lr, seed + 100, work / "run-fresh", None, 10)}
            mark = told["fresh"]["points"][-1][1]
            for run in ("importance", "random", "reversed", "fresh"):
                told[run] |= {
                    "start": told[run]["points"][0][1],
                    "end": told[run]["points"][-1][1],
                    "steps_to_fresh_end": steps_to(mark, told[run]["points"]),
                }
            result["seeds"][seed] = told
        path = Path(__file__).parent / "results" / "subcloning.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(
            seed,
            {r: {k: told[r][k] for k in ("start", "end", "steps_to_fresh_end")} for r in ("importance", "random", "reversed", "fresh")},
            flush=True,
        )


if __name__ == "__main__":
    main()
