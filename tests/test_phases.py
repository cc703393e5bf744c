"""Phases: the config changes within a run, and the curve is the same on every layout and through every resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import megascale as ms
from megascale.config.load import build_config
from megascale.config.phases import spans_of
from megascale.config.schema import Config
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.optim.learning_rate import learning_rate
from megascale.train.phases import phases_of
from tests.ranks import run_ranks
from tests.runs import losses, make_tokens, rows, run, settings, weights_at

pytestmark = pytest.mark.dist


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokens(tmp_path / "tokens", 200)
    make_tokens(tmp_path / "more", 150)
    return tmp_path


def phases(folder: Path) -> list[dict[str, Any]]:
    mixture = [{"path": str(folder / "tokens"), "weight": 1}, {"path": str(folder / "more"), "weight": 3}]
    return [
        {"from": "3 steps", "set": {"train.global_batch_size": 8, "optim.lr": 2e-3}},
        {"from": 16 * (3 * 4 + 3 * 8), "set": {"data.train": mixture, "train.clip": 0.1}},
        {"from": "9 steps", "set": {"train": {"seq_len": 32}, "model.rope_theta": 5e4, "optim.decay": "linear"}},
        {"from": "12 steps", "set": {"optim.betas": [0.8, 0.9], "data.train": str(folder / "more"), "model.dropout": 0.1}},
    ]


def values(folder: Path, place: Path | None = None, **changes: Any) -> dict[str, Any]:
    found = settings(folder if place is None else place, train__steps=14, checkpoint__every=5, **changes)
    return {**found, "data": {"train": str(folder / "tokens")}, "phases": phases(folder)}


def config(folder: Path, *entries: dict[str, Any], **changes: Any) -> Config:
    return check(build_config({**settings(folder, **changes), "phases": list(entries)}), 1)


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"parallel__tp": 2}),
    (2, {"parallel__pp": 2, "parallel__dp_shard": 1}),
    (1, {}),
    (2, {"parallel__dp_shard": 2, "parallel__accumulation": "layered"}),
    (2, {"parallel__cp": 2}),
    (2, {"parallel__engine": "ddp", "parallel__dp_shard": 1, "parallel__dp_replicate": 2}),
    (1, {}),
]


def test_one_curve_on_every_layout_and_through_every_resume(folder: Path) -> None:
    """Catches a phase that forgets what the one before drew, stepped or counted: a run that stops in every phase and on its borders, each
    time on another layout, has the curve and the weights of the one that stayed.
    """
    assert run(values(folder)) == (0, "done")
    stayed = rows(folder)
    assert [r["tokens"] for r in stayed] == [64, 128, 192, *range(320, 961, 128), *range(1216, 2241, 256)]
    assert [e["step"] for e in rows(folder, "events") if e["event"] == "phase"] == [3, 6, 9, 12]
    wandering = folder / "wandering"
    for (ranks, changes), stop in zip(LAYOUTS, (2, 4, 6, 8, 10, 12, None)):
        codes = run_ranks(ranks, run, values(folder, wandering, **changes), stop)
        assert {c for c, _ in codes} == {75 if stop else 0}, codes
    assert max(abs(a - b) / b for a, b in zip(losses(wandering), losses(folder), strict=True)) <= 1e-12
    assert [r["lr"] for r in rows(wandering)] == [r["lr"] for r in stayed]
    here, there = weights_at(folder, 14), weights_at(wandering, 14)
    assert all((here[n] - there[n]).abs().max() <= 1e-12 for n in here if here[n].is_floating_point())


def test_what_goes_on_in_memory_equals_a_rebuilt_trainer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches something that a light change leaves as it was: the batch, the scale of the loss, the clip, the rate, the data."""
    assert run(values(folder)) == (0, "done")
    rebuilt = folder / "rebuilt"
    monkeypatch.setattr("megascale.train.phases.goes_on", lambda before, now: False)
    assert run(values(folder, rebuilt)) == (0, "done")
    assert losses(rebuilt) == losses(folder)
    assert all(torch.equal(a, b) for a, b in zip(weights_at(folder, 14).values(), weights_at(rebuilt, 14).values()))


def test_a_first_phase_is_the_run_without_it(folder: Path) -> None:
    """Catches a phase that reaches back: up to its beginning the run is that without phases."""
    alone = folder / "alone"
    ramp = [{"from": "3 steps", "set": {"train.global_batch_size": 8}}]
    run({**settings(folder, train__steps=5), "phases": ramp})
    run({**settings(alone, train__steps=5), "data": {"train": str(folder / "tokens")}})
    assert losses(folder)[:3] == losses(alone)[:3] and losses(folder)[3] != losses(alone)[3]


def test_a_phase_may_be_added_until_it_begins(folder: Path) -> None:
    """Catches a run that cannot get a decay later, and one whose past can be rewritten."""
    plain = settings(folder, train__steps=8, checkpoint__every=2)
    assert run(plain, 4)[0] == 75
    late = [{"from": "5 steps", "set": {"optim.decay": "linear"}}]
    early = [{"from": "3 steps", "set": {"train.clip": 0.1}}]
    code, message = run({**plain, "phases": early})
    assert code == 2 and "phases that had begun" in message and "none there and from step 4: train.clip=0.1 now" in message
    assert run({**plain, "phases": late}, 6)[0] == 75
    code, message = run(plain)
    assert code == 2 and "from step 6: optim.decay=linear there and none now" in message
    assert run({**plain, "phases": late}) == (0, "done")
    assert rows(folder)[-1]["lr"] < 1e-3


def test_a_branch_begins_with_another_runs_checkpoint(folder: Path) -> None:
    """Catches a branch that trains the phases before its beginning again."""
    trunk = settings(folder, train__steps=6, optim__decay="constant", checkpoint__every=2, checkpoint__keep_last=9)
    ramp = {"from": "2 steps", "set": {"train.global_batch_size": 8}}
    assert run({**trunk, "phases": [ramp]}) == (0, "done")
    branch = folder / "branch"
    made = {**settings(branch, train__steps=6, optim__decay="constant"), "data": trunk["data"]}
    made["checkpoint"]["resume"] = str(folder / "run" / "checkpoints" / "step-00000004")
    assert run({**made, "phases": [ramp, {"from": "4 steps", "set": {"optim.decay": "linear"}}]}) == (0, "done")
    assert [r["step"] for r in rows(branch)] == [5, 6]
    assert rows(branch)[0]["loss"] == rows(folder)[4]["loss"] and rows(branch)[1]["loss"] != rows(folder)[5]["loss"]


def test_a_changed_mixture_repeats_nothing(folder: Path) -> None:
    """Catches places in the data that move with the weights: after a changed mixture at a resume no sample of an epoch comes twice."""
    mixed = [{"path": str(folder / "tokens"), "weight": 1}, {"path": str(folder / "more"), "weight": 1}]
    then = {**settings(folder, train__steps=8), "data": {"train": mixed}}
    assert run(then, 4)[0] == 75
    now = {**then, "data": {"train": [{**mixed[0], "weight": 5}, mixed[1]]}}
    now["run"] = {**then["run"], "allow_change": ["data.train"]}
    assert run(now) == (0, "done")
    assert any("every source continues where it was" in str(e) for e in rows(folder, "events"))
    from megascale.checkpoint.trainer import read_trainer

    drawn = read_trainer(folder / "run" / "checkpoints" / "step-00000008")["drawn"]
    assert [(s["end"], s["weights"]) for s in drawn] == [(20, {"tokens": 1.0, "more": 1.0})]


def test_growth_and_phases(folder: Path) -> None:
    """Catches a growth that forgets the phase's change, and a phase at a growth's step that is compared with the model before it."""
    grow = [{"step": 4, "ffn_size": 48}]
    entries = [
        {"from": "2 steps", "set": {"train.global_batch_size": 8}},
        {"from": "4 steps", "set": {"train.seq_len": 24, "optim.lr": 1e-3}},
        {"from": "6 steps", "set": {"train.clip": 0.1}},
    ]
    whole = {**settings(folder, train__steps=8, checkpoint__every=1), "grow": grow, "phases": entries}
    assert run(whole) == (0, "done")
    assert [r["tokens"] for r in rows(folder)] == [64, 128, 256, 384, 576, 768, 960, 1152]
    again = folder / "again"
    parts = {**whole, "run": settings(again)["run"]}
    for stop in (1, 5, None):
        assert run(parts, stop)[0] == (75 if stop else 0)
    assert losses(again) == losses(folder)


def test_inside_a_program(folder: Path) -> None:
    """Catches phases that a Session does not see, and a run without a directory that loses its weights between them."""
    light = {
        **settings(folder, train__steps=None, train__tokens=400),
        "phases": [{"from": "2 steps", "set": {"train.global_batch_size": 8}}],
    }
    with ms.training(build_config(light), run_dir=str(folder / "run")) as session:
        assert [step.number for step in session] == [1, 2, 3, 4]  # 64, 128, 256 and 384 tokens
    assert json.loads((folder / "run" / "exit.json").read_text())["code"] == 0
    del light["run"]["dir"]
    with ms.training(build_config(light), run_dir=None) as session:
        assert [step.number for step in session] == [1, 2, 3, 4]
    heavy = {**light, "phases": [{"from": "2 steps", "set": {"train.seq_len": 32}}]}
    with pytest.raises(UsageError, match=r"from step 3 on needs one.*Give run_dir"), ms.training(build_config(heavy), run_dir=None):
        pass


def test_where_phases_begin(folder: Path) -> None:
    """Catches a step too early or too late for a place in tokens, and a run in tokens that counts with the first batch."""
    entries = [
        {"from": 1_000, "set": {"train.global_batch_size": 8}},  # 64 tokens a step: after 16 steps there are 1024
        {"from": "20 steps", "set": {"train.seq_len": 32}},  # 4 steps of 128 tokens
    ]
    found = spans_of(config(folder, *entries, train__steps=None, train__tokens=10_000))
    assert [(s.first, s.last, s.samples, s.tokens) for s in found] == [(1, 16, 0, 0), (17, 20, 64, 1024), (21, 53, 96, 1536)]
    assert {s.config.train.total_steps for s in found} == {53} and {s.config.data.chunk for s in found} == {32}


def test_rates_may_follow_tokens(folder: Path) -> None:
    """Catches a batch ramp that stretches the warm-up or keeps the decay from ending."""
    ramp = {"from": "10 steps", "set": {"train.global_batch_size": 16}}

    def rates(by: str) -> list[float]:
        spans = spans_of(config(folder, ramp, train__steps=20, optim__schedule_by=by, optim__decay="linear", optim__warmup_steps=5))
        return [learning_rate(s.config.optim, s.clock.at(n), s.clock.total) for s in spans for n in range(s.first, s.last + 1)]

    def plain(at: float, total: float) -> float:
        return learning_rate(config(folder, optim__decay="linear", optim__warmup_steps=5).optim, at, total)

    assert rates("steps") == [plain(n, 20) for n in range(1, 21)]
    assert rates("tokens") == [plain(n, 50) for n in range(1, 11)] + [plain(10 + 4 * n, 50) for n in range(1, 11)]
    assert rates("tokens")[-1] == pytest.approx(0.1 * 3e-3)


def test_warm_restarts(folder: Path) -> None:
    """Catches a schedule that goes on counting from the run's beginning, or forgets a warm-up that a phase asks for."""
    again = {"from": "10 steps", "set": {"optim.warmup_steps": 3, "optim.decay": "cosine", "optim.decay_steps": 8}}
    spans = spans_of(config(folder, again, train__steps=20, optim__decay_steps=10))
    lr = [learning_rate(s.config.optim, s.clock.at(n), s.clock.total) for s in spans for n in range(s.first, s.last + 1)]
    assert (
        lr[9] == pytest.approx(3e-4) and lr[10] == pytest.approx(1e-3) and lr[12] == pytest.approx(3e-3) and lr[17] == pytest.approx(3e-4)
    )


def test_shapes_of_a_decay(folder: Path) -> None:
    """Catches a decay that does not begin at the peak, end at the minimum, or fall as its name says."""
    halfway = {"cosine": 0.5, "linear": 0.5, "1-sqrt": 1 - 0.5**0.5, "power": 0.125}
    for shape, left in halfway.items():
        whole = config(folder, optim__decay=shape, optim__decay_power=3, optim__warmup_steps=0).optim
        tail = config(
            folder, optim__decay="wsd", optim__wsd_decay=shape, optim__decay_power=3, optim__decay_steps=4, optim__warmup_steps=0
        ).optim
        for optim, start, total in ((whole, 0, 100), (tail, 60, 100)):
            optim = optim if optim is whole else optim.model_copy(update={"decay_steps": 40})
            rates = [learning_rate(optim, at, total) / optim.lr for at in (start, (start + total) / 2, total)]
            assert rates == pytest.approx([1.0, 0.1 + 0.9 * left, 0.1])


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"from": "3 steps", "set": {"train.clip": 1}}, {"from": "3 steps", "set": {"train.clip": 2}}], r"phases\[1\] begins at 3 steps"),
        ([{"from": "6 steps", "set": {"train.clip": 1}}], r"phases\[0\] begins at 6 steps, but the run of train.steps 6 ends"),
        ([{"from": "2 steps", "set": {"train.seq_lenn": 8}}], "did you mean train.seq_len"),
        ([{"from": "2 steps", "set": {"run.seed": 8}}], "a phase sets section.key of"),
        ([{"from": "2 steps", "set": {"train.steps": 8}}], "the length is that of the whole run"),
        ([{"from": "2 steps", "set": {"model.hidden_size": 48}}], r"embed.* is \[40, 24\] before and \[40, 48\] after.*use grow"),
        ([{"from": "2 steps", "set": {"parallel.tp": 3}}], "parallel.tp"),
        ([{"from": "2 steps", "set": {"model.qk_norm": True}}], "absent before"),
    ],
)
def test_what_is_refused(folder: Path, entries: list[dict[str, Any]], words: str) -> None:
    """Catches phases that fail in the middle of the night instead of at the start."""
    with pytest.raises(UsageError, match=words):
        phases_of(config(folder, *entries), 1)


def test_words_for_places(folder: Path) -> None:
    """Catches a place that nobody can read."""
    for wrong in (0, -5, "soon", "3 tokens", 1.5, True):
        with pytest.raises(UsageError, match=r"phases\.0\.from"):
            config(folder, {"from": wrong, "set": {"train.clip": 1.0}})
    assert config(folder, {"from": 1e9, "set": {"train.clip": 1.0}}).phases[0].tokens == 10**9


def test_data_that_goes(folder: Path) -> None:
    """Catches a phase whose data are missing and that is found out when it begins."""
    shutil.copy(folder / "more.bin", folder / "lost.bin")
    code, message = run({**settings(folder), "phases": [{"from": "2 steps", "set": {"data.train": str(folder / "lost")}}]})
    assert code == 2 and "lost" in message and not (folder / "run").exists()
