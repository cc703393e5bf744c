"""Whole runs: the curve survives stops, resumes and other layouts; what is wrong is said in one message."""

from __future__ import annotations

import io
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megascale.checkpoint import storage
from megascale.config.load import build_config
from megascale.data import loader
from megascale.data.samples import open_data, own_samples, valid_notes
from megascale.model.block import Block
from megascale.model.spec import ParamSpec, declare_state
from megascale.schedule.accumulate import Accumulation
from megascale.train import setup
from megascale.train.log.console import Console
from megascale.train.trainer import Trainer
from tests.ranks import run_ranks
from tests.runs import losses, make_tokens, rows, run, settings, weights_at

pytestmark = pytest.mark.dist


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokens(tmp_path / "tokens")
    return tmp_path


def other(folder: Path, name: str) -> Path:
    """A second place with the same tokens."""
    place = folder / name
    place.mkdir()
    for end in ("bin", "idx"):
        shutil.copy(folder / f"tokens.{end}", place / f"tokens.{end}")
    return place


def same_data(folder: Path, place: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run in `place` that has the identity of one in `folder`."""
    return {**settings(place, **changes), "data": {"train": str(folder / "tokens")}}


@pytest.mark.parametrize(("ranks", "changes"), [(1, {}), (2, {"parallel__dp_shard": 2})])
def test_resume_on_the_same_layout_is_bit_equal(folder: Path, ranks: int, changes: dict[str, Any]) -> None:
    """Catches any state that a checkpoint forgets: optimizer, data position, schedule."""
    assert run_ranks(ranks, run, settings(folder, **changes)) == [(0, "done")] * ranks
    again = other(folder, "again")
    first = same_data(folder, again, **changes)
    codes = run_ranks(ranks, run, first, 3)
    assert [c for c, _ in codes] == [75] * ranks, codes
    assert run_ranks(ranks, run, first) == [(0, "done")] * ranks
    assert losses(again) == losses(folder)
    assert losses(folder)[-1] < losses(folder)[0]
    straight, resumed = weights_at(folder, 6), weights_at(again, 6)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[n], resumed[n]) for n in straight)


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (3, {"parallel__dp_shard": 3}),
    (2, {"parallel__tp": 2, "parallel__tp_sequence": True}),
    (4, {"parallel__dp_shard": 2, "parallel__cp": 2}),
    (4, {"parallel__dp_replicate": 2, "parallel__dp_shard": 2, "parallel__recompute": "full"}),
    (4, {"parallel__tp": 2, "parallel__engine": "ddp", "parallel__dp_shard": 1, "parallel__dp_replicate": 2}),
    (1, {}),
]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_on_other_layouts(folder: Path, optimizer: str) -> None:
    """Catches state that is resharded wrongly: one run wanders over six layouts and equals the one that stayed."""
    fixed = {"optim__name": optimizer, "train__steps": 12, "model__vocab_size": 41, "checkpoint__every": 2}
    run_ranks(1, run, settings(folder, **fixed))
    wandering = other(folder, "wandering")
    for i, (ranks, changes) in enumerate(LAYOUTS):
        codes = run_ranks(ranks, run, same_data(folder, wandering, **fixed, **changes), 2 * i + 1)
        assert {c for c, _ in codes} == ({75} if i + 1 < len(LAYOUTS) else {0}), codes
    assert max(abs(a - b) / b for a, b in zip(losses(wandering), losses(folder))) <= 1e-12
    stayed, came = weights_at(folder, 12), weights_at(wandering, 12)
    assert {n: t.shape for n, t in stayed.items()} == {n: t.shape for n, t in came.items()}
    for name, tensor in stayed.items():
        assert (came[name] - tensor).abs().max() <= 1e-11 * tensor.abs().max().clamp(min=1e-3), name
    assert next(e["layout"] for e in rows(wandering, "events") if e["event"] == "start") == "dp_shard3"


def test_rows_after_the_checkpoint_are_dropped(folder: Path) -> None:
    """Catches curves that run twice over the same steps after a crash."""
    values = settings(folder)
    run_ranks(1, run, values)
    shutil.rmtree(folder / "run/checkpoints/step-00000006")
    for name in ("metrics", "events"):
        with (folder / "run" / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 7, "lo')  # killed while writing
    assert run_ranks(1, run, values) == [(0, "done")]
    assert len(losses(folder)) == 6
    assert "done" in [e["event"] for e in rows(folder, "events")]


def test_every_row_has_what_scripts_read(folder: Path) -> None:
    """Catches a renamed or missing key of INTERFACE, and numbers that are not JSON."""
    make_tokens(folder / "more", 20)
    valid = [{"path": str(folder / "tokens"), "name": "a"}, {"path": str(folder / "more"), "name": "b"}]
    run_ranks(2, run, settings(folder, data__valid=valid, train__eval_every=3, train__eval_steps=2, train__log_every=4))
    found = rows(folder)
    assert [r["step"] for r in found] == [1, 3, 4, 6]
    keys = ["step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds", "data_seconds", "mfu", "memory_bytes"]
    keys.append("sent_bytes")
    assert all(set(keys) <= r.keys() for r in found)
    assert [set(r["valid_loss"]) for r in found if "valid_loss" in r] == [{"a", "b"}] * 2
    assert found[-1]["tokens"] == 6 * 4 * 16 and found[-1]["sent_bytes"]["dp_shard"] > 0


@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_packing_is_the_same_on_every_layout(folder: Path, packing: str) -> None:
    """Catches a loss averaged per rank: with packing the ranks have different numbers of valid targets."""
    run_ranks(1, run, settings(folder, train__packing=packing))
    split = other(folder, "split")
    run_ranks(3, run, same_data(folder, split, train__packing=packing))
    assert max(abs(a - b) / b for a, b in zip(losses(split), losses(folder))) <= 1e-12


def counting(values: dict[str, Any], stop_at: int | None = None) -> tuple[int, str]:
    """A run whose blocks count their steps in a declared state that starts at 5."""
    build, step = Block.__init__, Accumulation.run

    def declare(self: Block, *args: Any) -> None:
        build(self, *args)
        declare_state(self, "age", ParamSpec((2,), "norm", "tokens", mean=5.0), torch.float32)

    def count(self: Accumulation, *args: Any) -> Any:
        for state in self.model.states:
            state.tensor.add_(1)
        return step(self, *args)

    Block.__init__, Accumulation.run = declare, count  # type: ignore[method-assign, assignment]
    return run(values, stop_at)


def test_declared_state_belongs_to_checkpoints(folder: Path) -> None:
    """Catches state of a layer that is left without a start, gets optimizer state, or is lost at a resume on another layout."""
    assert [code for code, _ in run_ranks(2, counting, settings(folder, parallel__tp=2), 2)] == [75, 75]
    assert run_ranks(3, counting, settings(folder, parallel__engine="ddp")) == [(0, "done")] * 3
    found = weights_at(folder, 6)
    for layer in range(2):
        assert torch.equal(found[f"model.blocks.{layer}.age"], torch.full((2,), 11.0))
    assert not any("age" in name for name in found if name.startswith("optim."))


def spoiled(values: dict[str, Any], bad_steps: list[int]) -> tuple[int, str]:
    """A run whose gradients are not finite at some steps, on the last rank only."""
    real, calls = Accumulation.run, [0]

    def spoil(self: Accumulation, *args: Any) -> Any:
        loss, model = real(self, *args), self.model
        calls[0] += 1
        if calls[0] in bad_steps and model.mesh.rank == model.mesh.size - 1:
            model.weights[0].local_grad[0] = float("nan")  # type: ignore[index]
        return loss

    Accumulation.run = spoil  # type: ignore[method-assign]
    return run(values)


class FakeWandb(ModuleType):
    """Stands in for Weights & Biases: remembers how runs were started and what they logged."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []

    def init(self, **how: Any) -> Any:
        self.started.append(how)
        return SimpleNamespace(id=how["id"] or "drawn-by-them", log=lambda values, step: self.logged.append((step, values)))


def test_wandb_keeps_its_id_over_a_resume(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a resume that begins another curve beside the first, rows that reach the logger under another step, and a run that begins
    from another one's checkpoint, or in a copy of its directory, and goes on in its curve.
    """
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    values = settings(folder, run__wandb=True, run__name="mine")
    assert run(values, 3)[0] == 75 and run(values) == (0, "done")
    assert [(how["id"], how["resume"], how["name"]) for how in fake.started] == [
        (None, "allow", "mine"),
        ("drawn-by-them", "allow", "mine"),
    ]
    assert [step for step, _ in fake.logged] == [1, 2, 3, 4, 5, 6]
    assert [values["loss"] for _, values in fake.logged] == losses(folder)
    shutil.copytree(folder / "run", folder / "copy")
    from_there = settings(folder, run__dir=str(folder / "other"), checkpoint__resume=str(folder / "run"))
    for theirs in (from_there, settings(folder, run__dir=str(folder / "copy"))):
        assert run({**theirs, "run": {**theirs["run"], "wandb": True, "name": "theirs"}}) == (0, "done")
    assert [how["id"] for how in fake.started[2:]] == [None, None]


def test_pipelines_are_refused_on_a_torch_that_cannot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback from inside torch 2.11, whose pipeline stages lack what ours use."""
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    for code, message in run_ranks(2, run, settings(folder, parallel__pp=2)):
        assert code == 2 and "parallel.pp is 2 but torch is 2.11.0" in message


def test_wandb_that_does_not_start_ends_all_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a missing key that ends rank 0 with a traceback and leaves the others waiting."""
    fake = FakeWandb()
    monkeypatch.setattr(fake, "init", lambda **how: (_ for _ in ()).throw(RuntimeError("no API key configured")))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for code, message in run_ranks(2, run, settings(folder, run__wandb=True)):
        assert code == 2 and "no API key configured" in message and "WANDB_MODE=offline" in message


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
def test_a_bad_step_changes_nothing(folder: Path, optimizer: str) -> None:
    """Catches a step that moves weights, momenta or step counts although a gradient was not finite somewhere."""
    values = settings(folder, optim__name=optimizer, checkpoint__every=1, checkpoint__keep_last=9)
    assert run_ranks(2, spoiled, values, [3]) == [(0, "done")] * 2
    before, after = weights_at(folder, 2), weights_at(folder, 3)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert any(not torch.equal(after[n], t) for n, t in weights_at(folder, 4).items())
    assert [(e["step"], e["grad_norm"]) for e in rows(folder, "events") if e["event"] == "skip"] == [(3, None)]
    assert rows(folder)[2]["grad_norm"] is None


def test_too_many_bad_steps_end_the_run(folder: Path) -> None:
    """Catches a run that burns its time on NaN."""
    values = settings(folder, train__max_skipped_steps=1, checkpoint__every=1)
    code, message = run_ranks(1, spoiled, values, [3, 4])[0]
    assert code == 3 and "max_skipped_steps is 1" in message and "last good checkpoint is step" in message


def emptied(values: dict[str, Any]) -> tuple[int, str]:
    """A run whose third step and whose validation set have no target."""
    real, batch = setup.micro_batches, values["train"]["global_batch_size"]

    def without_targets(config: Any, samples: Any, first: int, *rest: Any) -> list[loader.Batch]:
        made = real(config, samples, first, *rest)
        if samples.shuffled and first != 2 * batch:
            return made
        return [b._replace(targets=torch.full_like(b.targets, loader.NOT_COUNTED), valid=0) for b in made]

    setup.micro_batches = without_targets
    return run(values)


@pytest.mark.parametrize(("ranks", "optimizer"), [(1, "adamw"), (2, "muon")])
def test_a_step_without_targets_is_no_bad_gradient(folder: Path, ranks: int, optimizer: str) -> None:
    """Catches a batch of documents too short for a target that ends a run as if its rate were too high, or moves its weights."""
    values = settings(folder, train__max_skipped_steps=0, checkpoint__every=1, checkpoint__keep_last=9, optim__name=optimizer)
    values["train"] |= {"eval_every": 3, "eval_steps": 2}
    values["data"]["valid_fraction"] = 0.2
    assert run_ranks(ranks, emptied, values) == [(0, "done")] * ranks
    assert [(r["loss"] is None, r["grad_norm"] is None) for r in rows(folder)] == [(n == 3, n == 3) for n in range(1, 7)]
    events = rows(folder, "events")
    assert [e["step"] for e in events if e["event"] == "empty_step"] == [3] and not [e for e in events if e["event"] == "skip"]
    before, after = weights_at(folder, 2), weights_at(folder, 3)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert [r["valid_loss"] for r in rows(folder) if "valid_loss" in r] == [{"tokens": None}] * 2


def poisoned(values: dict[str, Any]) -> tuple[int, str]:
    """A run whose weights hold a NaN from the start, on the last rank."""
    real = Trainer.train

    def train(self: Trainer) -> None:
        if self.model.mesh.rank == self.model.mesh.size - 1:
            self.model.weights[-1].local.flatten()[0] = float("nan")
        real(self)

    Trainer.train = train  # type: ignore[method-assign]
    return run(values)


def test_weights_that_are_not_finite_are_named(folder: Path) -> None:
    """Catches the advice to lower the rate, and a "last good checkpoint" that holds the same NaN."""
    values = settings(folder, train__max_skipped_steps=1, checkpoint__every=1)
    for code, message in run_ranks(2, poisoned, values):
        assert code == 3 and "weights hold values that are not finite" in message and "from their start" in message
        assert "lower optim.lr" not in message and "last good checkpoint is" not in message
    for code, message in run_ranks(1, run, values):
        assert code == 2 and "step-0000000" in message, "a checkpoint that is not finite is refused where it is loaded"


def slow_data(values: dict[str, Any], seconds: float) -> tuple[int, str]:
    """A run that waits for every batch."""
    real = loader.Prefetcher.__next__

    def late(self: loader.Prefetcher) -> list[loader.Batch]:
        time.sleep(seconds)
        return real(self)

    loader.Prefetcher.__next__ = late  # type: ignore[method-assign]
    return run(values)


@pytest.mark.parametrize("log_every", [1, 3])
def test_waiting_for_data_has_a_number(folder: Path, log_every: int) -> None:
    """Catches tokens per second that only count the time in which there was something to do."""
    assert run_ranks(1, slow_data, settings(folder, train__log_every=log_every), 0.1) == [(0, "done")]
    for row in rows(folder):
        assert row["data_seconds"] >= 0.1 and row["tokens_per_second"] <= 4 * 16 / 0.1


def test_a_trace_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a profiler's file that ends a run on a full disk."""

    def full(*_: Any) -> None:
        raise RuntimeError("Failed to open file")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    assert run(settings(folder, train__steps=2, run__profile_step=2)) == (0, "done")
    assert "trace-rank0.json was not written; training continues: Failed to open file" in capfd.readouterr().err.replace("\n", " ")


def test_a_terminal_that_is_gone() -> None:
    """Catches a run that outlives its terminal's SIGHUP and dies of the next line that nobody can read."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    console = Console(2, 0)
    console.out.file = Gone()
    console.say("step 1")
    console.warn("careful")
    console.step({"step": 1, "loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "tokens_per_second": 1.0, "mfu": None})
    console.close()
    assert console.silent


def test_small_validation_sets_are_told(folder: Path) -> None:
    """Catches an evaluation that counts the first samples of a small set twice without a word."""
    values = settings(folder, train__eval_every=3, train__eval_steps=6, data__valid_fraction=0.2)
    config = build_config(values)
    _, valid = open_data(config)
    there = own_samples(valid["tokens"])
    assert there is not None and 12 < there < 24
    (note,) = valid_notes(config, valid)
    assert f"has {there} samples, but an evaluation takes 24" in note and f"{24 - there} of them count twice and the rest once" in note
    assert f"train.eval_steps={there // 4} counts none twice" in note
    values["train"]["eval_steps"] = there // 4
    assert valid_notes(build_config(values), valid) == []
    numbers = [valid["tokens"].sample(n)[0].tolist() for n in range(there + 1)]  # type: ignore[union-attr]
    assert numbers[0] == numbers[there] and len({tuple(n) for n in numbers}) > there // 2


def test_a_finished_run_says_so(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches "next is step 9" where the run has 6, and an empty answer to whoever starts it again."""
    assert run_ranks(1, run, settings(folder)) == [(0, "done")]
    assert run_ranks(1, run, settings(folder, train__steps=3)) == [(0, "done")]
    assert "already at step 6 of 3: nothing to do" in capfd.readouterr().err


def disk_full_at(values: dict[str, Any], bad: str) -> tuple[int, str]:
    real = storage.write_shard

    def full(path: Path, *args: Any) -> Any:
        if bad in str(path):
            raise OSError(28, "No space left on device")
        return real(path, *args)

    storage.write_shard = full
    return run(values)


def test_a_disk_that_fills_does_not_end_training(folder: Path) -> None:
    """Catches a run that dies of a failed save in the middle, and one that calls itself done without its last checkpoint."""
    assert run_ranks(2, disk_full_at, settings(folder), "step-00000003") == [(0, "done")] * 2
    assert [e["step"] for e in rows(folder, "events") if e["event"] == "save_failed"] == [3]
    code, message = run_ranks(1, disk_full_at, settings(other(folder, "b")), "step-00000006")[0]
    assert code == 3 and "No space left" in message and "last good one is step 3" in message


def test_identity_is_kept(folder: Path) -> None:
    """Catches a resume that silently continues another run, and changes that are allowed but not recorded."""
    run_ranks(1, run, settings(folder, train__steps=3))
    code, message = run_ranks(1, run, settings(folder, optim__lr=1e-3))[0]
    assert code == 2 and "optim.lr: 0.003 there, 0.001 now" in message and "run.allow_change='[optim.lr]'" in message
    code, _ = run_ranks(1, run, settings(folder, optim__lr=1e-3, run__allow_change=["optim.lr"]))[0]
    assert code == 0
    (change,) = [e for e in rows(folder, "events") if e["event"] == "change"]
    assert change["changes"] == {"optim.lr": [0.003, 0.001], "train.steps": [3, 6]}
    assert change["lr"] == pytest.approx([3e-4, 5.5e-4]) and rows(folder)[3]["lr"] == pytest.approx(5.5e-4)


def test_directories_of_others_are_left_alone(folder: Path) -> None:
    """Catches a run that writes over somebody's files."""
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("years")
    code, message = run_ranks(1, run, settings(folder))[0]
    assert code == 2 and "thesis.tex" in message
    assert [p.name for p in (folder / "run").iterdir()] == ["thesis.tex"]
    second = other(folder, "second")
    assert run_ranks(1, run, settings(second, train__steps=3))[0][0] == 0
    code, message = run_ranks(1, run, settings(second, checkpoint__resume="never"))[0]
    assert code == 2 and "already holds a run" in message


def test_weights_from_another_run(folder: Path) -> None:
    """Catches init_from that also takes the step, the optimizer or the data position."""
    run_ranks(1, run, settings(folder))
    fresh = other(folder, "fresh")
    values = settings(fresh, optim__lr=1e-4, checkpoint__init_from=str(folder / "run"), train__steps=1)
    assert run_ranks(2, run, values) == [(0, "done")] * 2
    assert losses(fresh)[0] < losses(folder)[0] - 0.1
    wrong = settings(other(folder, "wrong"), model__num_layers=3, checkpoint__init_from=str(folder / "run"))
    code, message = run_ranks(1, run, wrong)[0]
    assert code == 2 and "lacks model.blocks.2" in message and "model.num_layers was 2 and is 3: set them back" in message


def test_errors_of_one_rank_reach_all(folder: Path) -> None:
    """Catches ranks that wait for ever because one of them could not open its data."""
    assert [c for c, _ in run_ranks(2, missing_on_rank_one, settings(folder))] == [2, 2]


def missing_on_rank_one(values: dict[str, Any]) -> tuple[int, str]:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        values["data"]["train"] += "-elsewhere"
    return run(values)


def test_batches_come_from_the_sampler_alone(folder: Path) -> None:
    """Catches a loader with a memory: batch 5 is the same whether or not 0 to 4 were made."""
    from megascale.data.dataset import Corpus, Mixture

    mixture = Mixture([Corpus(str(folder / "tokens"), 1.0, "t")], 16, 1, 40, "all", 0.0, shuffled=True)
    late = loader.make_batch(mixture, [20, 21], "concat", torch.device("cpu"))
    for n in range(20):
        mixture.sample(n)
    assert torch.equal(loader.make_batch(mixture, [20, 21], "concat", torch.device("cpu")).tokens, late.tokens)


def apart(values: dict[str, Any]) -> tuple[int, str]:
    """A run in which a weight of rank 1 changes by itself in step 2."""
    step, steps = Accumulation.run, [0]

    def count(self: Accumulation, *args: Any) -> Any:
        steps[0] += 1
        if steps[0] == 2 and torch.distributed.get_rank() == 1:
            self.model.weights[0].local.data.add_(1e-3)
        return step(self, *args)

    Accumulation.run = count  # type: ignore[method-assign, assignment]
    return run(values)


def test_replicas_that_differ_end_the_run(folder: Path) -> None:
    """Catches a run that trains on for days after its ranks have come apart, since only a save "failed"."""
    values = settings(folder, parallel__dp_replicate=2, parallel__dp_shard=1, checkpoint__asynchronous=False, train__steps=20)
    for code, message in run_ranks(2, apart, values):
        assert code == 3 and "should be the same on ranks 0 and 1" in message and "last good one is" in message
    assert [r["step"] for r in rows(folder)] == [1, 2, 3] and [e["step"] for e in rows(folder, "events") if e["event"] == "diverged"] == [3]
