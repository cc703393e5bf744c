"""megascale from Python: samples in memory, runs without a directory, loops that are left, wrong use as sentences."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import megascale as ms
from megascale.config.load import build_config
from megascale.data.memory import TokenLists
from megascale.launch.ranks import RankInfo
from megascale.launch.rendezvous import is_free
from megascale.train.phases import Given
from megascale.train.session import with_samples
from megascale.train.setup import build_trainer
from tests.ranks import run_ranks
from tests.runs import VOCAB, rows, run, settings, weights_at

DOCUMENTS = [[(start + step * i) % VOCAB for i in range(20 + start)] for start in range(12) for step in (1, 2, 3)]


def values_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of more than one epoch that evaluates; no data are named."""
    values = settings(folder, train__eval_every=3, train__eval_steps=2, train__steps=6, train__global_batch_size=16, **changes)
    return {**values, "data": {"valid_fraction": 0.2}}


def test_importing_takes_no_torch() -> None:
    """Catches an import that makes scripts and launchers wait for torch before they have said anything, or a config that does."""
    code = (
        "import sys, megascale as ms; assert 'torch' not in sys.modules; dir(ms); ms.UsageError; "
        "ms.load_config({'model': {'num_layers': 1, 'hidden_size': 8, 'num_heads': 1}, 'train': {'steps': 1}}); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_functions_are_no_packages() -> None:
    """Catches a package of the same name, which hides a function of `ms` as soon as something imports it."""
    import megascale.api
    import megascale.generation.run  # noqa: F401

    assert all(callable(getattr(ms, name)) for name in ms.__all__)
    assert [k for k in ms.__all__ if (Path(ms.__file__).parent / k).exists()] == []


def trained(values: dict[str, Any], documents: list[list[int]]) -> list[tuple[float, float]]:
    """Losses and norms of a run on the present ranks that writes nothing."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if size > 1 else 0
    config = with_samples(build_config({**values, "data": {**values["data"], "train": "none"}}))
    with build_trainer(config, RankInfo(rank, size, rank, size), given=Given(TokenLists(documents), False, True)) as trainer:
        return [(step.loss, step.grad_norm) for step in trainer]


@pytest.mark.dist
def test_samples_in_memory_are_as_files(tmp_path: Path) -> None:
    """Catches another order, split or number of epochs than token files have, on one rank and on two, and evaluations that differ."""
    from megascale.data.indexed import TokenWriter

    with TokenWriter(tmp_path / "samples", np.uint16) as writer:
        for document in DOCUMENTS:
            writer.add(np.array(document))
    values = values_of(tmp_path)
    assert run({**values, "data": {**values["data"], "train": str(tmp_path / "samples")}}) == (0, "done")
    wanted = [(row["loss"], row["grad_norm"]) for row in rows(tmp_path)]
    with ms.training(values, samples=DOCUMENTS, run_dir=None) as session:
        steps = list(session)
        assert session.evaluate() == steps[-1].valid_loss
    assert [(s.loss, s.grad_norm) for s in steps] == wanted
    assert [s.valid_loss for s in steps if s.valid_loss] == [r["valid_loss"] for r in rows(tmp_path) if "valid_loss" in r]
    assert [(s.number, s.lr) for s in steps] == [(r["step"], r["lr"]) for r in rows(tmp_path)]
    cut = {**values, "parallel": {"tp": 2}}
    for got, reference in zip(run_ranks(2, trained, cut, DOCUMENTS)[1], wanted, strict=True):
        assert max(abs(a - b) / b for a, b in zip(got, reference)) <= 1e-12


def test_leaving_and_resuming(tmp_path: Path) -> None:
    """Catches a loop that is left without its last step saved, a resume that gives another curve, other samples taken in silence, and
    random numbers taken from the program's own.
    """
    values, state = values_of(tmp_path), torch.get_rng_state()
    with ms.training(values, samples=DOCUMENTS, run_dir=None) as session:
        wanted = [step.loss for step in session]
    with ms.training(values, samples=DOCUMENTS) as session:
        for step in session:
            if step.number == 2:
                break
        assert session.step == 2
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 75
    with pytest.raises(ms.UsageError, match=r"data.train: .* differ from those that the run was trained on"):
        ms.training(values, samples=DOCUMENTS[1:]).__enter__()
    with ms.training(values, samples=[np.array(d) for d in DOCUMENTS]) as session:
        assert session.step == 2
        for _ in session:
            break
        assert [step.number for step in session] == [4, 5, 6]  # who leaves a loop may begin another
        assert list(session) == []
    assert [row["loss"] for row in rows(tmp_path)] == wanted
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 0
    assert [e["event"] for e in rows(tmp_path, "events")].count("done") == 1
    model = ms.load_model(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
    weights = weights_at(tmp_path, 6)
    assert all(torch.equal(p.cpu(), weights[f"model.{name}"]) for name, p in model.module.named_parameters())


def test_an_error_of_the_program_loses_no_step(tmp_path: Path) -> None:
    """Catches an error between two steps that costs all steps since the last checkpoint, one inside a step whose half is saved, and a run
    that is used behind its end.
    """
    values = values_of(tmp_path, checkpoint__every=0)

    def train(do: Callable[[Any], Any], **where: Any) -> None:
        with ms.training(values, samples=DOCUMENTS, **where) as session:
            do(session)

    def interrupted(session: Any) -> None:
        assert session.step == 2
        next(iter(session))
        gate = session.trainer.activity.gate
        enter = gate.enter

        def once() -> None:
            gate.enter = enter
            raise KeyboardInterrupt

        gate.enter = once
        list(session)

    def without_room(session: Any) -> None:
        session.trainer.engine.evaluate = no_room
        session.evaluate()

    with pytest.raises(ZeroDivisionError):
        train(lambda session: [1 / (2 - step.number) for step in session])
    ending = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (ending["code"], ending["reason"], ending["step"]) == (1, "ZeroDivisionError: division by zero", 2)
    with pytest.raises(KeyboardInterrupt):
        train(interrupted)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step-00000002"
    with pytest.raises(ms.OutOfMemoryError, match="out of memory"):
        train(without_room, run_dir=None)
    over: list[Any] = []
    train(over.append, run_dir=None)
    for use in (over[0].evaluate, lambda: next(iter(over[0]))):
        with pytest.raises(ms.UsageError, match="the run has ended with its `with` block"):
            use()


def no_room(*_: Any) -> Any:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a log, a lock or a checkpoint of a run that has no directory, and a thread or a number of threads that is left behind."""
    import threading

    monkeypatch.chdir(tmp_path)
    values = values_of(tmp_path)
    del values["run"]["dir"]
    threads, alive = torch.get_num_threads(), set(threading.enumerate())
    for leave_at in (1, 6):
        with ms.training(values, samples=DOCUMENTS, run_dir=None) as session:
            assert next(s for s in session if s.number == leave_at)
    with pytest.raises(ZeroDivisionError), ms.training(values, samples=DOCUMENTS, run_dir=None) as session:
        next(iter(session)).number / 0
    assert list(tmp_path.iterdir()) == []
    for thread in set(threading.enumerate()) - alive:
        thread.join(5)
    assert set(threading.enumerate()) <= alive
    assert torch.get_num_threads() == threads
    for key, value in (("run.tensorboard", "true"), ("checkpoint.export", "hf"), ("checkpoint.resume", "elsewhere")):
        asked = ms.load_config(values, f"{key}={value}")
        with pytest.raises(ms.UsageError, match=f"run_dir is None, .* the config sets {key}"):
            ms.training(asked, samples=DOCUMENTS, run_dir=None).__enter__()


class Broken:
    """A dataset whose items cannot be read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> list[int]:
        raise KeyError(index)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([], "samples has 0 documents but no tokens"),
        ([[], []], "samples has 2 documents but no tokens"),
        ([[1, 2], [3, VOCAB]], f"samples hold token {VOCAB}, but the vocabulary has {VOCAB} entries"),
        ([[1, -2]], r"samples\[0\] holds -2 to 1"),
        ([[1, 2.5]], r"samples\[0\] is \[1, 2.5\], not a list of whole numbers"),
        ([[True, False]], "not a list of whole numbers"),
        (["some text"], r"samples\[0\] is 'some text'"),
        ([[1], [[2]]], r"samples\[1\] is \[\[2\]\]"),
        ([[1, [2]]], r"samples\[0\] cannot be read as a list"),
        ([{"input_ids": [1]}], r"samples\[0\] is \{'input_ids'"),
        ([[1 << 80]], "not a list of whole numbers"),
        (Broken(), r"samples\[0\] cannot be read as a list \(KeyError"),
        (iter([[1]]), "samples is a list_iterator"),
        ("text", "samples is a str"),
        ([[1, 2, 3]], "<samples> has 3 tokens, and one sample of train.seq_len 16 needs 17"),
        (None, "data.train is <samples>, which stands for samples in memory, and none are given"),
    ],
)
def test_samples_that_cannot_be(samples: Any, words: str, tmp_path: Path) -> None:
    """Catches a traceback, or a run that begins, where samples are no documents of the vocabulary."""
    values = settings(tmp_path)
    values["data"] = {}
    with pytest.raises(ms.UsageError, match=words):
        ms.training(values, samples=samples).__enter__()
    assert not (tmp_path / "run").exists()


def test_samples_that_change_are_noticed() -> None:
    """Catches a document that has become shorter, of which other tokens would be read without a word."""
    documents = [[1, 2, 3], [4, 5]]
    lists = TokenLists(documents)
    documents[0].pop()
    with pytest.raises(ms.UsageError, match=r"samples\[0\] has 2 tokens but had 3 when training began"):
        lists.read(0)


MODEL = {"num_layers": 1, "hidden_size": 8, "num_heads": 1}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ms.load_config([1]), "the config is a list: give a YAML file, or a dict"),
        (lambda: ms.load_config({"model": MODEL, "trian": {}}), "unknown key trian"),
        (lambda: ms.load_config({"model": {**MODEL, "num_layer": 2}, "train": {"steps": 1}}), "did you mean model.num_layers"),
        (lambda: ms.load_config({1: 2}), "has the key '1', a int"),
        (lambda: ms.load_config({"model": MODEL, "train": {"steps": 1}}, "train.step"), "write section.key=value"),
        (lambda: ms.load_config({"model": MODEL, "train": 3}), "train"),
        (
            lambda: ms.load_config({"model": MODEL, "train": {"steps": 1}}, ["train.steps=2"]),
            "an override is \\['train.steps=2'\\], a list",
        ),  # type: ignore[arg-type]
        (lambda: ms.load_config({"model": MODEL, "optimizer": {}, "train": {"steps": 1}}), "here it is called optim"),
        (lambda: ms.training({"model": MODEL, "train": {"steps": 1}}, [[1]], run_dir=3).__enter__(), "run_dir is 3"),  # type: ignore[arg-type]
        (lambda: ms.training({"model": MODEL, "train": {"steps": 1}}, [[1]], run_dir="").__enter__(), "run_dir is ''"),
        (lambda: ms.training({"model": MODEL, "train": {"steps": 1}}, [torch.ones(9, requires_grad=True)]).__enter__(), "requires grad"),
        (lambda: ms.dry_run({"model": MODEL, "train": {"steps": 1}}, 2.5), "ranks is 2.5"),  # type: ignore[arg-type]
        (lambda: ms.load_model(None), "the model is None"),  # type: ignore[arg-type]
        (lambda: ms.generate("nowhere", "x", temperature="1"), "temperature is '1'"),  # type: ignore[arg-type]
        (lambda: ms.generate("nowhere", "x", seed="a"), "seed is 'a'"),  # type: ignore[arg-type]
        (lambda: ms.grow("a", "b", workers="2", num_layers=3), "workers is '2'"),  # type: ignore[arg-type]
        (lambda: ms.load_config("nowhere.yaml"), "there is no config file nowhere.yaml"),
        (lambda: ms.training({"model": MODEL, "train": {"steps": 1}}, samples=[[1] * 600]).__enter__(), "model.vocab_size is absent"),
        (lambda: ms.dry_run({"model": MODEL, "train": {"steps": 1}}), "model.vocab_size is absent"),
        (lambda: ms.dry_run({"model": MODEL, "train": {"steps": 1}}, 0), "ranks is 0"),
        (lambda: ms.load_model("nowhere"), "nowhere"),
        (lambda: ms.grow("a", "b", hiden_size=3), "did you mean hidden_size"),
        (lambda: ms.grow("a", "b", hidden_size="3"), "hidden_size is '3'"),
        (lambda: ms.convert("a", "b", origin="hf", to="gguf"), "--to is gguf"),
        (lambda: ms.convert("a", "b", origin="hf", to="megascale", tokenz=[1]), "did you mean tokens"),
        (lambda: ms.generate("nowhere", "x", temperature=-1), "temperature is -1"),
        (lambda: ms.generate("nowhere", "x", max_new_tokens=0), "max_new_tokens is 0"),
        (lambda: ms.generate(3, "x"), "the model is a int"),  # type: ignore[arg-type]
    ],
)
def test_wrong_use_is_a_sentence(call: Callable[[], Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback of the core where a caller can mend it, and a folder that wrong use leaves behind."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ms.UsageError, match=words):
        call()
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_a_newer_version_says_so(tmp_path: Path) -> None:
    """Catches the Python face without the hint of the command line: an unknown key in a config that a later version has written."""
    file = tmp_path / "config.yaml"
    file.write_text("# Written by megascale 99.1\nmodel: {num_layers: 1, hidden_size: 8, num_heads: 1, flux: 2}\ntrain: {steps: 1}\n")
    with pytest.raises(ms.UsageError, match=r"unknown key model.flux(.|\n)*was written by megascale 99\.1"):
        ms.load_config(file)


def leave_alone(rank: int, port: int, values: dict[str, Any], leave_at: list[int], out: Any) -> None:
    """One rank of two, as a launcher starts it: leaves its loop after step `leave_at[rank]`, before the first for 0, with an error of its
    own after -n.
    """
    torch.set_num_threads(1)
    os.environ |= {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)}
    os.environ |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ending = "left"
    session = None
    try:
        with ms.training(values, samples=DOCUMENTS) as session:
            for step in session if leave_at[rank] else ():
                if step.number == leave_at[rank]:
                    break
                if step.number == -leave_at[rank]:
                    raise ArithmeticError("its own")
    except (ms.StopRequested, ArithmeticError) as error:
        ending = str(error)
    out.put((rank, ending, None if session is None else session.step))


@pytest.mark.dist
@pytest.mark.parametrize("leave_at", [[2, 2], [2, 1000], [-2, 1000], [0, 1000]])
def test_ranks_that_leave_their_loops(leave_at: list[int], tmp_path: Path) -> None:
    """Catches ranks that hang where a loop is left, on all of them or on one alone, before its first step or with an error, and a
    checkpoint of another step than they stand at.
    """
    values = values_of(tmp_path, parallel__dp_shard=2, checkpoint__every=0)
    values["train"] |= {"steps": 100_000, "eval_every": 0}
    port = next(p for p in range(29711, 29800) if is_free(p))
    context = multiprocessing.get_context("fork")
    out: Any = context.SimpleQueue()
    ranks = [context.Process(target=leave_alone, args=(r, port, values, leave_at, out), daemon=True) for r in range(2)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(120)
        assert [p.exitcode for p in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    (_, first, step), (_, second, other) = sorted(out.get() for _ in ranks)
    assert step == other
    if not leave_at[0]:
        assert (first, step) == ("left", 0) and second.startswith("rank 0 has left before the first step")
        assert not (tmp_path / "run" / "checkpoints").exists()
        return
    assert first == ("left" if leave_at[0] > 0 else "its own")
    why = "its loop was left" if leave_at[0] > 0 else "its program raised ArithmeticError"
    assert second == "left" if leave_at[1] == 2 else second.startswith(f"stopped on request ({why})")
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == (75 if leave_at[0] > 0 else 1)
    assert step == 2 or leave_at[1] != 2
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == f"step-{step:08d}"
