"""Steps that are skipped for a spike: the rule against a plain one, on every layout and through a resume, and what a bad batch does."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megascale.checkpoint.index import Damaged
from megascale.checkpoint.trainer import read_trainer
from megascale.config.schema import Config
from megascale.config.schema.train import SkipSpikes
from megascale.data.loader import Batch
from megascale.optim.spikes import FLOOR, SpikeGate
from megascale.train import setup
from tests.ranks import run_ranks
from tests.runs import VOCAB, losses, make_tokens, rows, run, settings

CPU = torch.device("cpu")


def plainly(steps: list[tuple[float, float]], cfg: SkipSpikes) -> list[bool]:
    """The rule with lists."""
    window: list[tuple[float, float]] = []
    taken, skipped = [], 0
    for step in steps:
        finite = all(math.isfinite(x) for x in step)
        spike = False
        if len(window) == cfg.window and finite:
            for kind, x in enumerate(step):
                before = [w[kind] for w in window]
                mean = statistics.fmean(before)
                spike |= x > mean + cfg.sigma * max(statistics.stdev(before), FLOOR * abs(mean))
        if spike and skipped >= cfg.in_a_row:
            window, spike = [], False
        taken.append(finite and not spike)
        skipped = 0 if taken[-1] else skipped + spike
        if taken[-1]:
            window = [*window, step][-cfg.window :]
    return taken


@pytest.mark.parametrize("seed", range(6))
def test_the_rule(seed: int) -> None:
    """Catches a window that holds skipped steps, a deviation of another kind, and a level that is never taken."""
    draw, cfg = np.random.default_rng(seed), SkipSpikes(sigma=3.0, window=8 + seed, in_a_row=1 + seed)
    steps = [(3 + 0.1 * draw.normal(), 1 + 0.2 * draw.normal()) for _ in range(150)]
    for at in draw.choice(150, 20, replace=False):
        kind = int(draw.integers(4))
        loss, norm = steps[at]
        steps[at] = [(loss + 2, norm), (loss, norm + 9), (math.nan, norm), (loss, math.inf)][kind]
    steps[100:] = [(loss + 5, norm) for loss, norm in steps[100:]]  # another level, which stays
    gate = SpikeGate(cfg, CPU)
    again, got = SpikeGate(cfg, CPU), []
    for number, (loss, norm) in enumerate(steps):
        if number == 60:
            again.load(gate.plain())
            gate = again
        got.append(gate.passes(torch.tensor(loss), torch.tensor(norm)).item())
    assert got == plainly(steps, cfg)
    assert not all(got) and got[-1]


BAD = 24  # the step whose targets are noise


def spoil(patch: pytest.MonkeyPatch) -> None:
    """Gives the samples of one step random targets, whatever rank holds them."""
    real = setup.micro_batches

    def spoiled(config: Config, samples: Any, first: int, mesh: Any, device: torch.device) -> list[Batch]:
        found = real(config, samples, first, mesh, device)
        if first // config.train.global_batch_size != BAD - 1:
            return found
        return [b._replace(targets=noise(b)) for b in found]

    patch.setattr(setup, "micro_batches", spoiled)


def noise(b: Batch) -> torch.Tensor:
    assert b.samples is not None
    rows = [torch.randint(0, VOCAB, b.targets.shape[1:], generator=torch.Generator().manual_seed(int(n))) for n in b.samples]
    return torch.where(b.targets >= 0, torch.stack(rows), b.targets)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("spikes")
    make_tokens(found / "tokens")
    return found


def values_of(folder: Path, name: str, gate: bool = True, **changes: Any) -> dict[str, Any]:
    sizes = {"train__steps": 32, "optim__lr": 2e-2, "optim__decay": "constant", "checkpoint__every": 10, **changes}
    if gate:
        sizes["train__skip_spikes"] = {"sigma": 5.0, "window": 8, "in_a_row": 3}
    return settings(folder, **sizes) | {"run": {"dir": str(folder / name / "run"), "device": "cpu", "threads": 1, "peak_tflops": 0.01}}


@pytest.mark.dist
def test_a_bad_batch_is_skipped_on_every_layout_and_through_a_resume(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a decision that depends on the layout, a window that a resume forgets (8 steps are not enough to fill it again before the bad
    one), and a skipped step that moves weights, counts as not finite or is not told.
    """
    spoil(monkeypatch)
    assert run_ranks(1, run, values_of(folder, "alone")) == [(0, "done")]
    skips = [e for e in rows(folder / "alone", "events") if e["event"] == "skip"]
    assert [(e["step"], e["why"]) for e in skips] == [(BAD, "spike")], skips
    wandering = {"parallel__tp": 2}, {"parallel__dp_shard": 2}
    first = values_of(folder, "wandering", **wandering[0])
    assert {code for code, _ in run_ranks(2, run, first, BAD - 4)} == {75}
    assert run_ranks(2, run, values_of(folder, "wandering", **wandering[1])) == [(0, "done")] * 2
    assert [e["step"] for e in rows(folder / "wandering", "events") if e["event"] == "skip"] == [BAD]
    assert losses(folder / "wandering") == pytest.approx(losses(folder / "alone"), rel=1e-9)
    assert run_ranks(1, run, values_of(folder, "without", gate=False)) == [(0, "done")]
    one, other = losses(folder / "alone"), losses(folder / "without")
    assert one[:BAD] == other[:BAD] and one[BAD] < other[BAD] - 0.05


WINDOW = {"losses": [1.0], "norms": [2.0], "taken": 1, "skipped": 0}
DAMAGED: list[Any] = [
    {"losses": [1.0]},
    WINDOW | {"norms": []},
    WINDOW | {"losses": [math.nan]},
    WINDOW | {"taken": -1},
    [],
    {"losses": "x"},
]


@pytest.mark.parametrize("value", DAMAGED)
def test_a_damaged_window_is_refused(tmp_path: Path, value: Any) -> None:
    """Catches a traceback for a trainer.json that was cut or edited."""
    (tmp_path / "trainer.json").write_text(json.dumps({"step": 1, "spikes": value}))
    with pytest.raises(Damaged, match="spikes is"):
        read_trainer(tmp_path)
