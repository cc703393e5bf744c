"""Small real runs: token files that can be learned, configs, and the trainer on ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megascale.config.load import build_config
from megascale.data.indexed import TokenWriter
from megascale.errors import MegascaleError
from megascale.launch.ranks import RankInfo
from megascale.train.faults.stop import StopFlag
from megascale.train.faults.watchdog import Activity
from megascale.train.growing import trainers
from megascale.train.trainer import Trainer

VOCAB = 40


def make_tokens(prefix: Path, documents: int = 60) -> str:
    """Counting sequences with random steps: the next token follows from the two before it."""
    random = np.random.default_rng(0)
    with TokenWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            start, step, length = random.integers(0, VOCAB), random.integers(1, 4), random.integers(20, 60)
            writer.add((start + step * np.arange(length)) % VOCAB)
    return str(prefix)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of 6 steps in fp64; `changes` are "section__key" values."""
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run"), "device": "cpu", "threads": 1, "peak_tflops": 0.01},
        "model": {
            "num_layers": 2,
            "hidden_size": 24,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_size": 32,
            "vocab_size": VOCAB,
            "init_std": 0.1,
        },
        "parallel": {},
        "train": {"steps": 6, "global_batch_size": 4, "micro_batch_size": 1, "seq_len": 16},
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "data": {"train": str(folder / "tokens")},
        "checkpoint": {"every": 3},
        "precision": {"compute": "fp64"},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        values[section]["async" if name == "asynchronous" else name] = value
    return values


def run(values: dict[str, Any], stop_at: int | None = None) -> tuple[int, str]:
    """Trains on the present ranks; (exit code, message). `stop_at`: a STOP file appears when that step is logged."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if size > 1 else 0
    try:
        with trainers(build_config(values), RankInfo(rank, size, rank, size), StopFlag(), Activity()) as phases:
            for trainer in phases:
                if stop_at is not None and rank == 0:
                    stop_after(trainer, stop_at, Path(values["run"]["dir"]))
                trainer.train()
    except MegascaleError as error:
        return error.code, str(error)
    return 0, "done"


def stop_after(trainer: Trainer, step: int, folder: Path) -> None:
    """Makes the STOP file when the row of `step` is logged."""
    log = trainer.reporter.log
    assert log is not None
    write = log.metrics

    def metrics(row: dict[str, Any]) -> None:
        write(row)
        if row["step"] == step:
            (folder / "STOP").touch()

    log.metrics = metrics  # type: ignore[method-assign]


def rows(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / f"{name}.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    assert [r["step"] for r in rows(folder)] == list(range(1, len(rows(folder)) + 1))
    return [r["loss"] for r in rows(folder)]


def weights_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    from megascale.checkpoint.index import read_index
    from megascale.checkpoint.shards import read_slice

    path = folder / "run" / "checkpoints" / f"step-{step:08d}"
    index = read_index(path)
    return {n: read_slice(index, n, (0,) * len(t.shape), t.shape) for n, t in index.tensors.items()}
