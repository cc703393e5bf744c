"""DeepSpeed as the engine: ZeRO 1–3 train what one process trains, and a run changes engines at a resume. Skipped without the package."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megascale.config.load import build_config, read_yaml
from megascale.errors import UsageError
from megascale.expand.grow import grow
from megascale.expand.options import GrowthOptions, Sizes
from megascale.expand.write import Effort
from tests.pairs.files import make_pairs, pair_settings
from tests.ranks import run_ranks
from tests.runs import losses, make_tokens, rows, run, settings, weights_at

HERE = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HERE, reason="the package deepspeed is missing")
pytestmark = pytest.mark.dist
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero 1": (2, {"parallel__zero_stage": 1}),
    "zero 2": (2, {"parallel__zero_stage": 2}),
    "zero 3": (3, {}),
    "zero 2 x tp": (4, {"parallel__zero_stage": 2, "parallel__tp": 2}),
    "zero 3 x tp sequence": (4, {"parallel__tp": 2, "parallel__tp_sequence": True}),
    "zero 3, state on the host": (2, {"parallel__offload": "parameters"}),
    "zero 2, state on the host, inputs too": (
        2,
        {"parallel__zero_stage": 2, "parallel__offload": ["optimizer", "activations"], "parallel__recompute": "full"},
    ),
}


def values(folder: Path, place: str = "run", **changes: Any) -> dict[str, Any]:
    result = settings(folder, **{"precision__compute": "fp32", "model__qk_norm": True, "train__steps": 8, **changes})
    result["run"]["dir"] = str(folder / place / "run")
    return result


def deepspeed_run(given: dict[str, Any], stop_at: int | None = None) -> tuple[int, str]:
    return run({**given, "parallel": {"engine": "deepspeed", **given["parallel"]}}, stop_at)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("runs")
    make_tokens(folder / "tokens")
    if HERE:
        assert run_ranks(1, run, values(folder, "single")) == [(0, "done")]
    return folder


@needs_deepspeed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_stage_equals_one_process(folder: Path, layout: str) -> None:
    """Catches gradients averaged instead of summed, clipping by a part of the norm, decayed norms. fp32 sums: 1e-5 over eight steps."""
    ranks, changes = LAYOUTS[layout]
    place = layout.replace(" ", "-")
    assert run_ranks(ranks, deepspeed_run, values(folder, place, **changes), timeout=120) == [(0, "done")] * ranks
    for key in ("loss", "grad_norm"):
        wanted, got = ([r[key] for r in rows(folder / p)] for p in ("single", place))
        assert max(abs(a - b) / b for a, b in zip(got, wanted)) <= 1e-5, key
    assert rows(folder / place)[-1]["sent_bytes"]["dp_shard"] > 0


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["encoder", "encoder_decoder"])
def test_other_families(tmp_path: Path, family: str, stage: int) -> None:
    """Catches a source that DeepSpeed does not hand on, and weights of the second stack that it reduces otherwise."""
    make_tokens(tmp_path / "tokens")
    changes: dict[str, Any] = {"precision__compute": "fp32", "train__steps": 4}
    if family == "encoder":
        given = settings(tmp_path, model__family=family, model__vocab_size=41, **changes)  # the last one is the mask
    else:
        given = pair_settings(tmp_path, data__train=make_pairs(tmp_path / "pairs"), **changes)
    for place, function, ranks in (("alone", run, 1), ("many", deepspeed_run, 2)):
        parallel = {"zero_stage": stage} if ranks == 2 else {}
        there = {**given, "run": {**given["run"], "dir": str(tmp_path / place / "run")}, "parallel": parallel}
        assert run_ranks(ranks, function, there, timeout=120) == [(0, "done")] * ranks
    alone, many = losses(tmp_path / "alone"), losses(tmp_path / "many")
    assert len(alone) == 4 and max(abs(a - b) / b for a, b in zip(many, alone)) <= 1e-5


@needs_deepspeed
def test_a_run_changes_engines(folder: Path) -> None:
    """Catches moments that are lost, cut wrongly or given to another weight, from and to every kind of partition."""
    place = "wandering"
    stages = [
        (deepspeed_run, 2, {"parallel__zero_stage": 2}, 1, 75),
        (run, 2, {"parallel__tp": 2}, 3, 75),
        (deepspeed_run, 4, {"parallel__tp": 2, "parallel__zero_stage": 1}, 5, 75),
        (deepspeed_run, 3, {}, None, 0),
    ]
    for function, ranks, changes, stop, code in stages:
        done = run_ranks(ranks, function, values(folder, place, **changes), stop, timeout=120)
        assert [c for c, _ in done] == [code] * ranks, done
    assert max(abs(a - b) / b for a, b in zip(losses(folder / place), losses(folder / "single"))) <= 1e-5
    stayed, came = weights_at(folder / "single", 8), weights_at(folder / place, 8)
    assert {n: t.shape for n, t in stayed.items()} == {n: t.shape for n, t in came.items()}
    for name, tensor in stayed.items():
        assert (came[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max().clamp(min=1e-3), name


def spoiled(given: dict[str, Any]) -> tuple[int, str]:
    """A run in which step 3's gradient is not finite on the last rank."""
    from megascale.train.engines.deepspeed import DeepSpeed

    real, calls = DeepSpeed.run, [0]

    def spoil(self: DeepSpeed, *args: Any) -> Any:
        calls[0] += 1
        bad = calls[0] == 3 and self.model.mesh.rank == self.model.mesh.size - 1
        hook = self.model.weights[0].parameter.register_hook(lambda g: g * float("nan")) if bad else None
        loss = real(self, *args)
        if hook is not None:
            hook.remove()
        return loss

    DeepSpeed.run = spoil  # type: ignore[method-assign]
    return deepspeed_run(given)


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_a_bad_step_changes_nothing(folder: Path, stage: int) -> None:
    """Catches NaN written into all weights: in fp32 DeepSpeed does not look unless told to."""
    place = f"spoiled{stage}"
    given = values(folder, place, parallel__zero_stage=stage, checkpoint__every=1, checkpoint__keep_last=9)
    assert run_ranks(2, spoiled, given, timeout=120) == [(0, "done")] * 2
    before, after = weights_at(folder / place, 2), weights_at(folder / place, 3)
    assert all((before[n] == after[n]).all() for n in before if not n.startswith("optim.step"))
    assert [(e["step"], e["grad_norm"]) for e in rows(folder / place, "events") if e["event"] == "skip"] == [(3, None)]


@needs_deepspeed
def test_nothing_is_compiled(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches set-up that builds an extension for minutes: the folder for them stays empty."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert run_ranks(2, deepspeed_run, values(folder, "lean", train__steps=1), timeout=120) == [(0, "done")] * 2
    assert not list(tmp_path.rglob("*"))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where an extra is missing, and an import of it by those who do not ask for it."""
    name = "megascale.train.engines.deepspeed"
    code = f"import sys; sys.modules['deepspeed'] = None; import megascale.train.setup; assert '{name}' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    from megascale.train.engines.deepspeed import DeepSpeed
    from tests.layouts import CPU, Case, build, tiny

    config = build_config(
        {"model": tiny().model_dump(), "train": {"steps": 1}, "data": {"train": "x"}, "parallel": {"engine": "deepspeed"}}
    )
    with pytest.raises(UsageError, match="pip install deepspeed"):
        DeepSpeed(build(Case(tiny()), 1), config, CPU)


@needs_deepspeed
def test_grown_checkpoints(folder: Path, tmp_path: Path) -> None:
    """Catches grown moments that DeepSpeed loses, and inserted layers, whose count of updates starts at 0, given the others' count."""
    source = folder / "single" / "run" / "checkpoints" / "step-00000003"
    grow(source, tmp_path / "wide", Sizes(ffn_size=48), GrowthOptions(ffn="zero", optimizer="transform"), Effort(tokens=32))
    grow(source, tmp_path / "deep", Sizes(num_layers=3), GrowthOptions(optimizer="transform"), Effort(tokens=32))

    def go_on(name: str, place: str, function: Callable[..., Any], ranks: int, **parallel: Any) -> list[tuple[int, str]]:
        config = read_yaml(tmp_path / name / "config.yaml")
        config["run"]["dir"], config["checkpoint"]["resume"] = str(tmp_path / place / "run"), str(tmp_path / name)
        config["parallel"] = parallel
        return run_ranks(ranks, function, config, timeout=120)

    assert go_on("wide", "alone", run, 1) == [(0, "done")]
    assert go_on("wide", "many", deepspeed_run, 2, zero_stage=2) == [(0, "done")] * 2
    alone, many = ([row["loss"] for row in rows(tmp_path / place)] for place in ("alone", "many"))
    assert len(alone) == len(many) == 5 and max(abs(a - b) / b for a, b in zip(many, alone)) <= 1e-5
    code, message = go_on("deep", "refused", deepspeed_run, 2)[0]
    assert code == 2 and "one count for all of them" in message and "checkpoint.init_from" in message
