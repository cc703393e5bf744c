"""Growing real checkpoints: optimizer state, workers, kills, damage, layouts."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megascale.checkpoint.index import read_index
from megascale.checkpoint.loader import verify
from megascale.config.load import load_config, read_yaml
from megascale.errors import TrainingError, UsageError
from megascale.expand.grow import grow
from megascale.expand.options import GrowthOptions, Sizes
from megascale.expand.write import Effort
from tests.ranks import run_ranks
from tests.runs import make_tokens, run, settings

QUICK = Effort(tokens=32, slab_bytes=1 << 12)
DOUBLE = Sizes(48, 8, 4, ffn_size=64)
STEPS = 13


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 13 steps in fp64 with a checkpoint after each third; weight decay, clipping and an epsilon that matters."""
    folder = tmp_path_factory.mktemp("small")
    make_tokens(folder / "tokens")
    assert run(values(folder))[0] == 0
    return folder


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    common = {"train__steps": STEPS, "optim__decay": "constant", "optim__eps": 1e-3, "checkpoint__keep_last": 9}
    return settings(folder, **{**common, **changes})


def step(folder: Path, number: int) -> Path:
    return folder / "run" / "checkpoints" / f"step-{number:08d}"


def losses_of(run_dir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in rows}


def go_on(grown: Path, where: Path, **changes: Any) -> dict[int, float]:
    """The grown checkpoint's own config, from its state to the last step."""
    config = read_yaml(grown / "config.yaml")
    config["run"] |= {"dir": str(where)}
    config["checkpoint"] |= {"resume": str(grown)}
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    code, message = run(config)
    assert code == 0, message
    return losses_of(where)


def test_a_grown_run_is_the_same_run(small: Path, tmp_path: Path) -> None:
    """Catches moments, rates, decays, epsilons or norms that are not scaled as the weights are: AdamW runs of the small model and of its
    double, without noise, stay equal over 10 steps, clipping included.
    """
    grow(step(small, 3), tmp_path / "grown", DOUBLE, GrowthOptions(symmetry="none", optimizer="transform", lossless="require"), QUICK)
    grown, alone = go_on(tmp_path / "grown", tmp_path / "run"), losses_of(small / "run")
    assert sorted(grown) == list(range(4, STEPS + 1))
    gap = max(abs(grown[s] - alone[s]) / alone[s] for s in grown)
    assert gap < 1e-12
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    norms = {json.loads(line)["step"]: json.loads(line)["grad_norm"] for line in (small / "run" / "metrics.jsonl").read_text().splitlines()}
    assert max(abs(r["grad_norm"] - norms[r["step"]]) for r in rows) < 1e-12


@pytest.mark.parametrize("what", ["copied", "reset", "one rate"])
def test_naive_state_is_another_run(small: Path, tmp_path: Path, what: str) -> None:
    """Catches a test above that would pass whatever the state is."""
    options = GrowthOptions(symmetry="none", optimizer="reset" if what == "reset" else "transform")
    grow(step(small, 3), tmp_path / "grown", DOUBLE, options, QUICK)
    if what == "copied":
        unscale(tmp_path / "grown")
    changes = {"optim__multipliers": {}} if what == "one rate" else {}
    if changes:  # they are part of a run's identity
        changes |= {"run__allow_change": ["optim.multipliers"]}
    grown, alone = go_on(tmp_path / "grown", tmp_path / "run", **changes), losses_of(small / "run")
    assert max(abs(grown[s] - alone[s]) for s in grown) > 1e-6


def unscale(folder: Path) -> None:
    """Moments as a plain copy would have them: what was divided by the number of copies is multiplied with it again."""
    import zlib

    from safetensors.torch import load_file, save_file

    from megascale.checkpoint.index import FileEntry

    path = next(p for p in folder.iterdir() if p.name.startswith("step-"))
    index = json.loads((path / "index.json").read_text())
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.startswith("optim.exp_avg"):
                tensors[name] *= 4 if "sq" in name else 2
        save_file(tensors, file)
        data = file.read_bytes()
        index["files"][file.name] = vars(FileEntry(len(data), zlib.crc32(data)))
    (path / "index.json").write_text(json.dumps(index))


def test_workers_and_slabs_change_no_bit(small: Path, tmp_path: Path) -> None:
    """Catches noise, means or starts that depend on who makes them."""
    sizes = Sizes(54, 8, 4, 8, 40, num_layers=3, vocab_size=50)
    options = GrowthOptions(optimizer="transform", symmetry="snr:20", split=(2.0, 1.0))
    found = []
    for name, effort in (("one", Effort(tokens=0)), ("slabs", Effort(slab_bytes=1 << 10, tokens=0)), ("three", Effort(3, 1 << 11, 0))):
        grow(step(small, 12), tmp_path / name, sizes, options, effort)
        index = read_index(tmp_path / name / "step-00000012")
        assert verify(index) == []
        found.append({n: f for n, f in index.files.items() if n != "trainer.json"})
    assert found[0] == found[1] == found[2]


def command(source: Path, target: Path, *flags: str) -> list[str]:
    return [sys.executable, "tools/grow.py", str(source), str(target), *flags]


@pytest.mark.slow
def test_kills_at_random_moments(small: Path, tmp_path: Path) -> None:
    """Catches a half-written checkpoint under its own name, and a second run that does not finish the first one's."""
    flags = [
        "--hidden-size",
        "96",
        "--num-layers",
        "6",
        "--max-slab-mb",
        "1",
        "--tokens",
        "0",
        "--optimizer",
        "transform",
        "--workers",
        "2",
    ]
    whole = tmp_path / "whole"
    assert subprocess.run(command(step(small, 12), whole, *flags), check=False).returncode == 0
    expected = read_index(whole / "step-00000012").files
    draws, target = random.Random(1), tmp_path / "killed"
    for _ in range(6):
        process = subprocess.Popen(
            command(step(small, 12), target, *flags), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(draws.uniform(1.0, 9.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        published = list(target.glob("step-*")) if target.exists() else []
        assert all(verify(p) == [] for p in published)
        if published:
            break
    if not any(target.glob("step-*")):
        assert subprocess.run(command(step(small, 12), target, *flags), check=False).returncode == 0
    files = read_index(target / "step-00000012").files
    assert {n: f for n, f in files.items() if n != "trainer.json"} == {n: f for n, f in expected.items() if n != "trainer.json"}


def test_the_command_line(small: Path, tmp_path: Path) -> None:
    """Catches a report without its verdict, a target that is written over, and a smaller one that is not refused."""
    done = subprocess.run(
        command(step(small, 12), tmp_path / "grown", "--hidden-size", "30", "--num-layers", "3", "--lossless", "require",
                "--report", str(tmp_path / "r.json")),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["verdict"] == "exact" and report["proof"]["transform"]["logits_max"] < 1e-10
    assert report["config"]["model.hidden_size"] == [24, 30] and report["coverage"]["source_dropped"] == {}
    assert set(report["tensors"]) == {n.removeprefix("model.") for n in read_index(tmp_path / "grown" / "step-00000012").tensors}
    assert load_config(tmp_path / "grown" / "config.yaml").model.hidden_size == 30
    refused = subprocess.run(
        command(step(small, 12), tmp_path / "grown", "--hidden-size", "48"), capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2 and "exists already" in refused.stderr and "Traceback" not in refused.stderr
    with pytest.raises(UsageError, match="growth does not shrink"):
        grow(step(small, 12), tmp_path / "other", Sizes(8), GrowthOptions(), QUICK)
    with pytest.raises(UsageError, match="nothing grows"):
        grow(step(small, 12), tmp_path / "other", Sizes(24), GrowthOptions(), QUICK)
    with pytest.raises(UsageError, match="identity and cancel are exact"):
        grow(step(small, 12), tmp_path / "other", Sizes(num_layers=4), GrowthOptions(depth="stack", lossless="require"), QUICK)
    assert not (tmp_path / "other").exists()


def test_a_kill_after_the_last_shard(small: Path, tmp_path: Path) -> None:
    """Catches a checkpoint that was published and not proven, which no rerun finishes, and another growth that takes it for its own."""
    target = tmp_path / "grown"
    first = grow(step(small, 12), target, DOUBLE, GrowthOptions(), QUICK)
    (target / "config.yaml").unlink()
    (target / "latest").unlink()
    with pytest.raises(UsageError, match="exists already"):
        grow(step(small, 12), target, DOUBLE, GrowthOptions(seed=2), QUICK)
    again = grow(step(small, 12), target, DOUBLE, GrowthOptions(), QUICK)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}
    assert load_config(target / "config.yaml").model.hidden_size == 48
    with pytest.raises(UsageError, match="exists already"):
        grow(step(small, 12), target, DOUBLE, GrowthOptions(), QUICK)


def test_a_disk_that_fills_on_the_way(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback instead of a message, and half a checkpoint that stays."""
    import errno

    from megascale.checkpoint import streaming

    def full(path: Path, *args: Any) -> Any:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(streaming, "write_shard", full)
    with pytest.raises(UsageError, match="No space left on device"):
        grow(step(small, 12), tmp_path / "grown", DOUBLE, GrowthOptions(), QUICK)
    assert not (tmp_path / "grown").exists()


def test_damaged_sources(small: Path, tmp_path: Path) -> None:
    """Catches a bit flip that grows along, a shard that is missing, and damage on the way that is taken for wrong use."""
    import shutil

    source = tmp_path / "source"
    shutil.copytree(step(small, 12), source)
    shard = next(source.glob("*.safetensors"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    with pytest.raises(UsageError, match="checksum"):
        grow(source, tmp_path / "grown", DOUBLE, GrowthOptions(), QUICK)
    shard.write_bytes(b"\xff" * 8 + good[8:])
    with pytest.raises(TrainingError, match="damaged on the way"):
        grow(source, tmp_path / "grown", DOUBLE, GrowthOptions(), Effort(tokens=0, check=False))
    shard.unlink()
    with pytest.raises(UsageError, match="is missing"):
        grow(source, tmp_path / "grown", DOUBLE, GrowthOptions(), QUICK)
    assert not (tmp_path / "grown").exists()


def test_a_full_disk_is_told_before_anything_is_written(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a growth that fills the disk and then fails."""
    import shutil
    from collections import namedtuple

    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(1, 1, 10))
    with pytest.raises(UsageError, match=r"needs [0-9.,]+ [kM]?B but its disk has"):
        grow(step(small, 12), tmp_path / "grown", DOUBLE, GrowthOptions(), QUICK)
    assert not (tmp_path / "grown").exists()


def _resume(config: dict[str, Any]) -> tuple[int, str]:
    return run(config)


DEEPER = {"dense": Sizes(48, 8, 4, 6, 64, num_layers=4), "experts": Sizes(36, 6, 3, num_layers=3, experts=4)}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dp": ("dense", 2, {"dp_shard": 2}),
    "tp": ("dense", 2, {"tp": 2, "dp_shard": 1}),
    "pp": ("dense", 2, {"pp": 2, "dp_shard": 1}),
    "ring": ("dense", 2, {"cp": 2, "dp_shard": 1}),
    "ulysses": ("dense", 2, {"cp": 2, "cp_method": "ulysses", "dp_shard": 1}),
    "ep": ("experts", 2, {"ep": 2}),
    "ep x cp": ("experts", 2, {"ep": 2, "cp": 2}),
}


@pytest.fixture(scope="module")
def deeper(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Grown from step 9 with its optimizer state, and the rest of the run on one process beside it."""
    folder = tmp_path_factory.mktemp("deeper")
    for name, sizes in DEEPER.items():
        grow(step(small, 9), folder / name, sizes, GrowthOptions(optimizer="transform"), QUICK)
        go_on(folder / name, folder / f"{name}-alone")
    return {name: folder / name for name in DEEPER}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_grown_checkpoint_goes_on_on_any_layout(deeper: dict[str, Path], tmp_path: Path, layout: str) -> None:
    """Catches a grown state that only the layout it was made on can read, and per-layer coefficients that a stage does not know."""
    name, ranks, parallel = LAYOUTS[layout]
    config = read_yaml(deeper[name] / "config.yaml")
    config["run"]["dir"], config["checkpoint"]["resume"], config["parallel"] = str(tmp_path / "many"), str(deeper[name]), parallel
    assert run_ranks(ranks, run, config, timeout=150)[0] == (0, "done")
    many, alone = losses_of(tmp_path / "many"), losses_of(deeper[name].with_name(f"{name}-alone"))
    assert sorted(many) == sorted(alone) == [10, 11, 12, 13] and max(abs(many[s] - alone[s]) for s in alone) < 1e-12


def test_coefficients_and_epsilons_travel_with_the_config(tmp_path: Path) -> None:
    """Catches a DeepNorm model that grew in depth and, resumed or begun anew, is refused or runs with the new depth's α."""
    folder = tmp_path / "deep"
    folder.mkdir()
    make_tokens(folder / "tokens")
    assert run(values(folder, model__residual="deepnorm", model__norm="layernorm", model__bias=True, train__steps=3))[0] == 0
    report = grow(
        step(folder, 3), tmp_path / "grown", Sizes(48, num_layers=4), GrowthOptions(optimizer="transform", lossless="require"), QUICK
    )
    assert report["verdict"] == "exact" and "model.layer_coefficients" in report["config"]
    assert sorted(go_on(tmp_path / "grown", tmp_path / "resumed", train__steps=5)) == [4, 5]
    config = read_yaml(tmp_path / "grown" / "config.yaml")
    config["run"]["dir"], config["checkpoint"] = str(tmp_path / "begun"), {"init_from": str(tmp_path / "grown")}
    assert run(config)[0] == 0
    config["run"]["dir"] = str(tmp_path / "third")
    config["model"]["layer_coefficients"] = None
    code, message = run(config)
    assert code == 2 and "skip" in message


def test_multipliers_of_unknown_weights_are_refused(small: Path) -> None:
    """Catches a multiplier that is ignored."""
    config = values(small, optim__multipliers={"blocks.*.attention.query.weight": {"lr": 0.5}})
    config["run"]["dir"] = str(small / "never")
    code, message = run(config)
    assert code == 2 and "did you mean blocks.*.attention" in message
    assert not (small / "never").exists()
