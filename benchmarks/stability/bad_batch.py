"""What one bad batch does to a run, with `train.skip_spikes` and without.

    python -m benchmarks.stability.bad_batch PREFIX WORK [SEEDS]     # PREFIX: token files, such as those of `make quickstart`

A small decoder trains three times on the same samples: undisturbed, and with the targets of one step replaced by one token, with the kit
and without. Compared are means of the loss over 11 steps, 50 steps after the bad one.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, write
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.data.loader import Batch
from megascale.errors import MegascaleError
from megascale.launch.ranks import RankInfo
from megascale.train import setup
from megascale.train.faults.stop import StopFlag
from megascale.train.faults.watchdog import Activity
from megascale.train.growing import trainers

BAD, AFTER, HALF = 200, 50, 5
STEPS = BAD + AFTER + HALF
KIT = "train.skip_spikes={sigma: 6, window: 64}"
FIXED = [f"train.steps={STEPS}", "train.eval_every=0", "train.log_every=1", "checkpoint.every=0", "run.device=cpu", "optim.decay=constant"]
SIZES = ["train.global_batch_size=8", "train.seq_len=128", "optim.lr=3e-3", "optim.warmup_steps=50"]


def spoiled(real: Any, bad: bool) -> Any:
    """`micro_batches` whose step BAD asks for the same token everywhere."""

    def made(config: Config, samples: Any, first: int, mesh: Any, device: torch.device) -> list[Batch]:
        found: list[Batch] = real(config, samples, first, mesh, device)
        if not bad or first // config.train.global_batch_size != BAD - 1:
            return found
        return [b._replace(targets=torch.where(b.targets >= 0, 7, b.targets)) for b in found]

    return made


def curve(prefix: str, folder: Path, seed: int, bad: bool, kit: bool) -> list[float]:
    words = [f"data.train={prefix}", f"run.dir={folder}", f"run.seed={seed}", *FIXED, *SIZES, *([KIT] if kit else [])]
    real = setup.micro_batches
    setup.micro_batches = spoiled(real, bad)
    try:
        with trainers(load_config("configs/quickstart.yaml", words), RankInfo(), StopFlag(), Activity()) as phases:
            for trainer in phases:
                trainer.train()
    except MegascaleError as error:
        raise SystemExit(f"error: {error}") from None
    finally:
        setup.micro_batches = real
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def later(losses: list[float]) -> float:
    middle = BAD + AFTER - 1
    return statistics.fmean(losses[middle - HALF : middle + HALF + 1])


def main(prefix: str, work: Path, seeds: int) -> None:
    torch.set_num_threads(1)
    rows = []
    for seed in range(1, seeds + 1):
        found = {}
        for name, bad, kit in (("undisturbed", False, True), ("with the kit", True, True), ("without", True, False)):
            folder = work / f"{name.replace(' ', '-')}-{seed}"
            if folder.exists():
                raise SystemExit(f"error: {folder} exists: name an empty folder")
            found[name] = curve(prefix, folder, seed, bad, kit)
        calm = later(found["undisturbed"])
        moved = {name: later(losses) - calm for name, losses in found.items()}
        rows.append({"seed": seed, "loss": calm, "at_the_bad_step": found["without"][BAD - 1], "moved": moved})
    write(__file__, "bad_batch", {"machine": machine(), "steps_after": AFTER, "seeds": rows})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 3)
