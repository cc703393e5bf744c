"""Fields from arrays, the simulation that makes them, and runs that learn them on any layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megascale.config.schema import Spacetime
from megascale.data.dataset import Corpus
from megascale.data.fields import FieldMixture
from megascale.data.indexed import TokenWriter
from megascale.errors import UsageError
from tests.ranks import run_ranks
from tests.runs import losses, rows, run, settings, weights_at
from tools.shallow_water import Water, simulate

CPU = torch.device("cpu")
FIELDS = Spacetime(shape=(4, 6, 8), patch=(1, 3, 2), channels=2, objective="next_step")


def write(prefix: Path, runs: int = 5, frames: int = 9, **facts: Any) -> Corpus:
    """Frame f of run r is 100·r + f everywhere, plus the channel's number."""
    values = np.arange(runs)[:, None] * 100 + np.arange(frames)[None]
    array = np.broadcast_to(values.reshape(-1, 1, 1, 1), (runs * frames, 6, 8, 2)) + np.arange(2)
    np.save(f"{prefix}.npy", array.astype(np.float32))
    Path(f"{prefix}.json").write_text(json.dumps({"run_length": frames, **facts}))
    return Corpus(str(prefix), 1.0, prefix.name)


def test_every_window_comes_once_and_within_a_run(tmp_path: Path) -> None:
    """Catches a window over the seam of two runs, and an epoch that repeats or leaves out a window."""
    mixture = FieldMixture([write(tmp_path / "a")], FIELDS, 7, "all", 0.0, shuffled=True)
    count = 5 * (9 - 5 + 1)
    for epoch in range(2):
        first = [mixture.sample(epoch * count + i)[:, 0, 0, 0] for i in range(count)]
        assert all((np.diff(x) == 1).all() and len(x) == 5 for x in first)
        assert len({float(x[0]) for x in first}) == count


def test_runs_are_held_out_whole(tmp_path: Path) -> None:
    """Catches validation on a run that training has seen from another frame on."""
    source = write(tmp_path / "a")
    parts = [FieldMixture([source], FIELDS, 7, part, 0.3, shuffled=False) for part in ("train", "valid")]
    seen = [{int(m.sample(i)[0, 0, 0, 0]) // 100 for i in range(len(m.files[0]))} for m in parts]
    assert seen[0] and seen[1] and not seen[0] & seen[1] and seen[0] | seen[1] == set(range(5))


def test_each_sample_has_the_text_of_its_run(tmp_path: Path) -> None:
    """Catches a text of the next run, of the order in which runs come, and texts that are more or fewer than runs."""
    source, told = write(tmp_path / "a"), FIELDS.model_copy(update={"text_len": 3, "text_vocab_size": 60})
    for runs in (5, 4):
        with TokenWriter(tmp_path / "a.text", np.uint16) as writer:
            for run in range(runs):
                writer.add(np.array([10 * run + i for i in range(1 + run)]))
        if runs == 5:
            mixture = FieldMixture([source], told, 7, "all", 0.0, shuffled=True)
            for number in range(25):
                run = int(mixture.sample(number)[0, 0, 0, 0]) // 100
                batch = mixture.batch([number, -1], CPU)
                assert batch.source is not None and batch.source[1].tolist() == [-1] * 3
                assert batch.source[0].tolist() == ([10 * run + i for i in range(1 + run)] + [-1] * 3)[:3]
            small = FieldMixture([source], told.model_copy(update={"text_vocab_size": 20}), 7, "all", 0.0, shuffled=False)
            with pytest.raises(UsageError, match=r"a.text holds token \d+ but model.spacetime.text_vocab_size is 20"):
                [small.batch([n], CPU) for n in range(25)]
    with pytest.raises(UsageError, match=r"holds 5 runs but .*a.text has 4 documents: one text per run is needed"):
        FieldMixture([source], told, 7, "all", 0.0, shuffled=True)


def test_values_are_normalized_and_hidden_patches_are_a_function_of_the_sample(tmp_path: Path) -> None:
    """Catches statistics of another channel, and hidden patches that depend on the batch that a sample is in."""
    source = write(tmp_path / "a", mean=[10.0, 1.0], std=[2.0, 4.0])
    masked = FIELDS.model_copy(update={"objective": "masked", "mask_ratio": 0.3})
    mixture = FieldMixture([source], masked, 7, "all", 0.0, shuffled=False)
    batch, other = mixture.batch([3, -1, 5], CPU), mixture.batch([5], CPU)
    assert batch.tokens[0, 0, 0, 0].tolist() == [(3 - 10) / 2, (3 + 1 - 1) / 4]
    hidden = round(0.3 * masked.tokens)
    assert [(t == 0).sum().item() for t in batch.targets] == [hidden, 0, hidden] and batch.valid == 2 * hidden
    assert torch.equal(batch.targets[2], other.targets[0]) and not torch.equal(batch.targets[0], batch.targets[2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (4, 6, 10)}, "model.spacetime has shape [4, 6, 10]"),
        ({"shape": (9, 6, 8)}, "one sample needs 10"),
        ({"channels": 3}, "3 channels"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """Catches a traceback, or a model that reads another grid than its own."""
    source = write(tmp_path / "a")
    with pytest.raises(UsageError) as error:
        FieldMixture([source], FIELDS.model_copy(update=change), 7, "all", 0.0, shuffled=True)
    assert words in str(error.value) and str(tmp_path / "a.npy") in str(error.value)


def test_broken_arrays_and_statistics(tmp_path: Path) -> None:
    """Catches pickles being opened, a division by a deviation of zero, and tracebacks for what is no array."""
    source = write(tmp_path / "a", std=[1.0, 0.0])
    with pytest.raises(UsageError, match="std"):
        FieldMixture([source], FIELDS, 7, "all", 0.0, shuffled=True)
    np.save(tmp_path / "b.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "empty.npy").write_bytes(b"")
    with (tmp_path / "many.npy").open("wb") as file:
        np.savez(file, a=np.zeros(3))
    (tmp_path / "folder.npy").mkdir()
    for name in ("b", "nowhere", "empty", "many", "folder"):
        with pytest.raises(UsageError, match=name):
            FieldMixture([Corpus(str(tmp_path / name), 1.0, name)], FIELDS, 7, "all", 0.0, shuffled=True)


def test_water_keeps_its_mass_and_its_waves_their_speed() -> None:
    """Catches a wrong sign or factor in the equations: mass is constant, and a small wave of wavenumber k turns with ω² = f² + g·H·k²."""
    run_of_water = simulate(16, 16, 6, 0.1, np.random.default_rng(1))
    mass = run_of_water[..., 0].mean((1, 2))
    assert np.isfinite(run_of_water).all() and np.abs(mass - mass[0]).max() < 1e-12
    assert np.abs(np.diff(run_of_water, axis=0)).max() > 1e-3
    water, k = Water(16, 16), 2 * np.pi
    x = np.arange(16) / 16
    surface = 1e-6 * np.cos(k * x)[None] * np.ones((16, 1))
    state = np.stack([np.fft.rfft2(surface), np.zeros((16, 9)), np.zeros((16, 9))]).astype(complex)
    time, dt = 0.4, 0.002
    for _ in range(round(time / dt)):
        state = water.step(state, dt)
    omega2 = 16.0 + k**2
    expected = 1e-6 * (16.0 + k**2 * np.cos(np.sqrt(omega2) * time)) / omega2  # the balanced part stays, the rest turns
    assert abs(water.grid(state[0])[0, 0] - expected) < 3e-9


@pytest.fixture(scope="module")
def water(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tool's own output: 6 runs of 8 frames."""
    folder = tmp_path_factory.mktemp("water")
    command = [sys.executable, "tools/shallow_water.py", "--out", str(folder / "tokens"), "--runs", "6", "--frames", "8"]
    done = subprocess.run([*command, "--height", "8", "--width", "12"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.dist
def test_a_run_learns_and_wanders_over_layouts(water: Path, tmp_path: Path) -> None:
    """Catches data, metrics, evaluation or checkpoints that know text only: a run of the real trainer, resumed under other methods."""
    fields = {"shape": [4, 8, 12], "patch": [1, 2, 3], "channels": 3, "objective": "next_step"}
    changes: dict[str, Any] = {
        "model__family": "spacetime",
        "model__num_layers": 3,
        "model__spacetime": fields,
        "model__vocab_size": None,
        "train__seq_len": 64,
        "train__eval_every": 3,
        "train__eval_steps": 1,
        "data__train": str(water / "tokens"),
        "data__valid_fraction": 0.3,
        "checkpoint__every": 2,
    }
    assert run_ranks(1, run, settings(tmp_path, **changes)) == [(0, "done")]
    other = tmp_path / "other"
    layouts: list[tuple[int, dict[str, Any], int | None]] = [
        (2, {"parallel__cp": 2, "parallel__cp_method": "dsp"}, 2),
        (4, {"parallel__cp": 2, "parallel__cp_method": "ulysses", "parallel__tp": 2}, 4),
        (3, {"parallel__cp": 3}, None),
    ]
    for ranks, layout, stop in layouts:
        codes = run_ranks(ranks, run, {**settings(other, **changes, **layout)}, stop)
        assert {c for c, _ in codes} == {75 if stop else 0}, codes
    assert max(abs(a - b) / b for a, b in zip(losses(other), losses(tmp_path))) <= 1e-12
    stayed, came = weights_at(tmp_path, 6), weights_at(other, 6)
    assert all((came[n] - t).abs().max() <= 1e-11 * t.abs().max().clamp(min=1e-3) for n, t in stayed.items())
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    found = rows(other)
    assert found[0]["sent_bytes"]["cp"] > 0 and "tokens" in next(iter(r["valid_loss"] for r in found if "valid_loss" in r))


def test_a_run_with_texts_is_one_curve(tmp_path: Path) -> None:
    """Catches a vocabulary of texts that is not found, and a text that a stage or another rank of the sequence does not get."""
    write(tmp_path / "a", mean=[200.0, 200.0], std=[150.0, 150.0])
    with TokenWriter(tmp_path / "a.text", np.uint16) as writer:
        for run_number in range(5):
            writer.add(np.array([run_number, 7]))
    (tmp_path / "a.text.json").write_text(json.dumps({"vocab_size": 9}))
    fields = {"shape": [4, 6, 8], "patch": [1, 3, 2], "channels": 2, "objective": "next_step", "text_len": 4}
    model = {"model__family": "spacetime", "model__spacetime": fields, "model__vocab_size": None, "train__seq_len": 32}
    straight = settings(tmp_path, **model, data__train=str(tmp_path / "a"), train__steps=3)
    assert run_ranks(1, run, straight) == [(0, "done")]
    for name, ranks, parallel in (("dsp", 2, {"cp": 2, "cp_method": "dsp"}), ("pp", 2, {"pp": 2})):
        (tmp_path / name).mkdir()
        values = {**settings(tmp_path / name, **model, train__steps=3), "data": straight["data"], "parallel": parallel}
        assert {c for c, _ in run_ranks(ranks, run, values)} == {0}
        assert max(abs(a - b) / b for a, b in zip(losses(tmp_path / name), losses(tmp_path))) <= 1e-12
