"""Checkpoints of models with layers of different kinds, latent attention and multi-token prediction, grown and shrunk on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megascale.commands.grow import app as grow_app
from megascale.commands.shrink import app as shrink_app
from megascale.config.load import build_config
from megascale.errors import UsageError
from megascale.expand.grow import grow
from megascale.expand.options import GrowthOptions, Sizes, kinds_of
from megascale.expand.write import Effort
from megascale.train.phases import phases_of
from tests.expand.test_grow import go_on, losses_of
from tests.ranks import run_ranks
from tests.runs import make_tokens, run, settings

MIXED: dict[str, Any] = {
    "num_layers": 3,
    "kinds": {"local": {"sliding_window": 5}, "deep": {"attention": "latent", "num_kv_heads": 4, "latent": {"kv_rank": 8, "rope_dim": 4}}},
    "pattern_first": ["local"],
    "pattern": ["deep", "local"],
    "mtp_depth": 1,
}
DOUBLE = Sizes(48, kinds=kinds_of(["kinds.deep.num_heads=8", "kinds.local.ffn_size=64"]))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 7 steps of a model of two kinds of layers, on one process, with a checkpoint after its third."""
    folder = tmp_path_factory.mktemp("mixed")
    make_tokens(folder / "tokens")
    model = {f"model__{key}": value for key, value in MIXED.items()}
    values = settings(folder, train__steps=7, optim__decay="constant", optim__eps=1e-3, checkpoint__keep_last=9, **model)
    assert run(values)[0] == 0
    return folder


def test_the_state_of_kinds_grows_too(mixed: Path, tmp_path: Path) -> None:
    """Catches moments, rates and epsilons of one kind or of a module that are another's: the run of the double is the small one's."""
    source = mixed / "run" / "checkpoints" / "step-00000003"
    options = GrowthOptions(symmetry="none", optimizer="transform", lossless="require")
    report = grow(source, tmp_path / "grown", DOUBLE, options, Effort(tokens=32, slab_bytes=1 << 12))
    assert report["verdict"] == "exact" and len(report["proof"]["transform"]["mtp_max"]) == 1
    grown, alone = go_on(tmp_path / "grown", tmp_path / "run"), losses_of(mixed / "run")
    assert sorted(grown) == [4, 5, 6, 7] and max(abs(grown[s] - alone[s]) / alone[s] for s in grown) < 1e-12


@pytest.mark.dist
def test_grown_kinds_go_on_on_another_layout(mixed: Path, tmp_path: Path) -> None:
    """Catches a grown checkpoint whose stages or shards are those of the smaller model: layers of a kind and modules are added, and two
    ranks of a pipeline, two of tensor parallelism continue as one process does.
    """
    source = mixed / "run" / "checkpoints" / "step-00000003"
    sizes = Sizes(mtp_depth=2, kinds=kinds_of(["kinds.local.num_layers=3", "kinds.deep.num_heads=6"]))
    report = grow(source, tmp_path / "grown", sizes, GrowthOptions(optimizer="transform"), Effort(tokens=32))
    assert report["verdict"] == "exact" and report["config"]["model.num_layers"] == [3, 4]
    alone = go_on(tmp_path / "grown", tmp_path / "alone")
    parted = run_ranks(4, _parted, tmp_path / "grown", tmp_path / "parted", timeout=240)[0]
    assert sorted(parted) == [4, 5, 6, 7] and max(abs(parted[s] - alone[s]) / alone[s] for s in alone) < 1e-12


def _parted(grown: Path, where: Path) -> dict[int, float]:
    return go_on(grown, where, parallel__pp=2, parallel__tp=2)


def test_a_run_knows_how_its_kinds_will_grow(tmp_path: Path) -> None:
    """Catches a growth in a run that forgets the sizes of a kind, and a misspelled one that only the step would meet."""
    values = settings(tmp_path, **{f"model__{key}": value for key, value in MIXED.items()})
    values["grow"] = [{"step": 3, "mtp_depth": 2, "kinds": {"deep": {"num_heads": 8, "kv_rank": 12}, "local": {"num_layers": 3}}}]
    grown = phases_of(build_config(values), 1)[1].config.model
    assert grown.latent is None and grown.mtp_depth == 2 and len(grown.layers_of("local")) == 3
    deep = grown.of_kind("deep")
    assert deep.latent is not None and (deep.num_heads, deep.latent.kv_rank) == (8, 12)
    values["grow"][0]["kinds"] = {"deep": {"kv_ranks": 12}}
    with pytest.raises(UsageError, match="kv_ranks is not a size of a kind; did you mean kv_rank"):
        phases_of(build_config(values), 1)


def test_the_commands_take_sizes_of_a_kind(mixed: Path, tmp_path: Path) -> None:
    """Catches a command line that leaves out what the functions do."""
    source, report = str(mixed / "run"), tmp_path / "report.json"
    more = ["kinds.deep.kv_rank=12", "kinds.local.num_layers=3", "--mtp-depth", "2", "--tokens", "32", "--report", str(report)]
    done = CliRunner().invoke(grow_app, [source, str(tmp_path / "grown"), *more])
    assert done.exit_code == 0 and "exact" in done.output, done.output
    config = json.loads(report.read_text())["config"]
    assert config["model.kinds.deep.latent.kv_rank"] == [8, 12] and config["model.mtp_depth"] == [1, 2]
    fewer = ["--drop-layers", "1", "--mtp-depth", "1", "--tokens", "32", "--report", str(report)]
    done = CliRunner().invoke(shrink_app, [str(tmp_path / "grown"), str(tmp_path / "back"), *fewer])
    assert done.exit_code == 0 and json.loads(report.read_text())["kept"]["layers"] == [0, 2, 3], done.output
