"""Growth inside a run, and runs that begin with a grown model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megascale.config.load import build_config
from megascale.config.schema import Optim
from megascale.errors import MegascaleError, UsageError
from megascale.launch.ranks import RankInfo
from megascale.optim.learning_rate import begun_again, learning_rate
from megascale.sizes import count_words
from megascale.train.estimate.dry_run import dry_run
from megascale.train.faults.stop import StopFlag
from megascale.train.faults.watchdog import Activity
from megascale.train.growing import trainers
from tests.ranks import run_ranks
from tests.runs import make_tokens, settings


def grown_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    values = settings(folder, train__steps=9, optim__decay="constant", checkpoint__every=2, checkpoint__keep_last=20, **changes)
    values["grow"] = [
        {"step": 3, "hidden_size": 48, "num_heads": 8, "num_kv_heads": 4, "ffn_size": 64, "symmetry": "none"},
        {"step": 6, "num_layers": 4},
    ]
    return values


def train(values: dict[str, Any], stop_at: int | None = None) -> tuple[int, str]:
    """As pretrain.py does, on the present ranks."""
    import torch.distributed as dist

    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if size > 1 else 0
    try:
        with trainers(build_config(values), RankInfo(rank, size, rank, size), StopFlag(), Activity()) as phases:
            for trainer in phases:
                if stop_at is not None and rank == 0 and trainer.reporter.log is not None:
                    log, write = trainer.reporter.log, trainer.reporter.log.metrics

                    def metrics(row: dict[str, Any], log: Any = log, write: Any = write) -> None:
                        write(row)
                        if row["step"] == stop_at:
                            (log.run_dir / "STOP").touch()

                    log.metrics = metrics  # type: ignore[method-assign]
                trainer.train()
    except MegascaleError as error:
        return error.code, str(error)
    return 0, "done"


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    return [r["loss"] for r in rows]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "run" / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e.get("event", e.get("kind")) == kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_tokens(folder / "tokens")
    assert train(grown_settings(folder)) == (0, "done")
    return folder


def test_a_run_grows_and_goes_on(whole: Path, tmp_path: Path) -> None:
    """Catches a growth that starts the run anew: the loss curve is one, and a double without noise stays on the small model's."""
    make_tokens(tmp_path / "tokens")
    small = {k: v for k, v in grown_settings(tmp_path).items() if k != "grow"}
    assert train(small) == (0, "done")
    alone, grown = losses(tmp_path), losses(whole)
    assert len(grown) == 9
    assert max(abs(a - b) for a, b in zip(alone[:6], grown[:6])) < 1e-12  # doubled after step 3
    assert abs(alone[6] - grown[6]) < 1e-12 and abs(alone[8] - grown[8]) > 1e-9  # deeper after step 6: the same function, then another
    told = events(whole, "grow")
    assert [e["step"] for e in told] == [3, 6] and {e["verdict"] for e in told} == {"exact"}


@pytest.mark.parametrize("stop_at", [pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 6])
def test_a_stop_anywhere_and_on_again(whole: Path, tmp_path: Path, stop_at: int) -> None:
    """Catches a restart that forgets a growth, or grows twice."""
    make_tokens(tmp_path / "tokens")
    assert train(grown_settings(tmp_path), stop_at)[0] == 75
    (tmp_path / "run" / "STOP").unlink(missing_ok=True)
    assert train(grown_settings(tmp_path)) == (0, "done")
    assert losses(tmp_path) == losses(whole)


def test_a_growth_killed_before_its_proof_is_proven_when_the_run_comes_back(whole: Path, tmp_path: Path) -> None:
    """Catches a run that takes a written and unproven checkpoint for a grown one."""
    make_tokens(tmp_path / "tokens")
    assert train(grown_settings(tmp_path), 4)[0] == 75
    (tmp_path / "run" / "STOP").unlink(missing_ok=True)
    run = tmp_path / "run"
    (run / "grown-1" / "config.yaml").unlink()
    for later in (run / "checkpoints").glob("step-*"):
        if later.name > "step-00000003":
            shutil.rmtree(later)
    (run / "checkpoints" / "latest").write_text("step-00000003\n")
    assert train(grown_settings(tmp_path)) == (0, "done")
    assert losses(tmp_path) == losses(whole) and (run / "grown-1" / "config.yaml").exists()
    assert [e["step"] for e in events(tmp_path, "grow")][-2:] == [3, 6]


def test_going_back_before_a_growth(whole: Path, tmp_path: Path) -> None:
    """Catches a way back to a smaller model that goes on from the grown one, and a growth of the branch that was left."""
    shutil.copytree(whole / "run", tmp_path / "run")
    back = str(tmp_path / "run" / "checkpoints" / "step-00000004")
    values = grown_settings(whole, run__dir=str(tmp_path / "run"), checkpoint__resume=back)
    values["train"]["steps"] = 9
    assert train(values) == (0, "done")
    assert losses(tmp_path) == losses(whole)
    assert [e["step"] for e in events(tmp_path, "grow")] == [3, 6, 6] and len(events(tmp_path, "go_back")) == 1
    (aside,) = (tmp_path / "run" / "checkpoints").glob("set-aside-*")
    assert "grown-2" in {p.name for p in aside.iterdir()} and (tmp_path / "run" / "grown-2" / "config.yaml").exists()
    assert train(values) == (0, "done") and len(events(tmp_path, "go_back")) == 1


def test_a_dry_run_says_what_the_run_becomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a dry run that passes over growths: their sizes, and a refusal that only the run itself would meet."""
    make_tokens(tmp_path / "tokens")
    values = grown_settings(tmp_path)
    dry_run(build_config(values), 1, str(tmp_path / "dry.json"))
    told = json.loads((tmp_path / "dry.json").read_text())
    assert [g["after_step"] for g in told["growths"]] == [3, 6]
    sizes = [told["parameters"], *(g["parameters"] for g in told["growths"])]
    assert sizes == sorted(set(sizes)) and f"after step 6: 1 process: {count_words(sizes[2])} parameters" in capsys.readouterr().out
    values["grow"][1] = {"step": 6, "hidden_size": 40}
    with pytest.raises(UsageError, match="growth does not shrink"):
        dry_run(build_config(values), 1, None)


@pytest.mark.dist
def test_every_phase_has_its_own_layout(whole: Path, tmp_path: Path) -> None:
    """Catches a layout that is kept where the grown model has another, or whose open sizes are left open."""
    make_tokens(tmp_path / "tokens")
    values = grown_settings(tmp_path, parallel__dp_shard=2)
    values["grow"][0]["parallel"] = {"tp": 2}
    assert run_ranks(2, train, values, timeout=120)[0] == (0, "done")
    assert [e["layout"] for e in (*events(tmp_path, "start"), *events(tmp_path, "resume"))] == ["dp_shard2", "tp2", "tp2"]
    config = json.loads((tmp_path / "run" / "checkpoints" / "step-00000009" / "trainer.json").read_text())["config"]
    assert config["parallel"]["dp_shard"] == 1
    assert max(abs(a - b) for a, b in zip(losses(tmp_path), losses(whole))) < 1e-12


def test_a_growth_that_is_refused_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Catches a run that trains for days and then cannot grow."""
    make_tokens(tmp_path / "tokens")
    values = grown_settings(tmp_path)
    for entry, words in (
        ({"step": 6, "hidden_size": 40}, "growth does not shrink"),
        ({"step": 6}, "nothing grows"),
        ({"step": 3, "num_layers": 4}, "grow is at steps 3, 3"),
    ):
        values["grow"][1] = entry
        code, message = train(values)
        assert code == 2 and words in message
        assert not (tmp_path / "run").exists()


def test_lemons_schedule() -> None:
    """Catches a decay that is not faster, and numbers of the config that are overruled."""
    cfg = begun_again(Optim(lr=1.0, min_lr_ratio=0.0), 100)
    assert (cfg.warmup_steps, cfg.decay_steps) == (2, 60)
    assert learning_rate(cfg, 2, 100) == 1.0 and learning_rate(cfg, 60, 100) == 0.0
    own = begun_again(Optim(warmup_steps=9, decay_steps=80), 100)
    assert (own.warmup_steps, own.decay_steps) == (9, 80)
