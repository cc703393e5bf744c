"""Averages of the weights (`optim.ema`): their formula, on every layout, through resumes, in evaluations, growths and exports."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from typer.testing import CliRunner

from megascale.checkpoint.index import read_index
from megascale.checkpoint.loader import find
from megascale.checkpoint.shards import read_slice
from megascale.comm.mesh import build_mesh
from megascale.commands.main import app
from megascale.config.layout import axis_sizes
from megascale.config.load import build_config
from megascale.config.schema import Config, Ema, Optim, Parallel
from megascale.config.schema.averages import MASS
from megascale.config.support import check
from megascale.data.loader import sample_numbers
from megascale.errors import UsageError
from megascale.formats.load import load_model
from megascale.formats.sources import open_checkpoint
from megascale.optim.averages import averages_of, own_average, shown
from megascale.optim.optimizers import build_optimizer
from megascale.planning.memory import stored_bytes
from megascale.train.build import build_engine, draw_model
from megascale.train.engines.engine import backward, total_over_ranks, update
from megascale.train.estimate.memory import largest_rank, optimizer_bytes
from megascale.train.phases import phases_of
from megascale.verify.steps import gather_whole
from tests.layouts import CPU, Case, build, fake_batch, tiny
from tests.ranks import run_ranks
from tests.runs import losses, make_tokens, rows, run, settings
from tests.test_optimizers import step

EMA: Any = (0.5, {"half_life": "3 steps"}, {"half_life": 4 * 12 * 2})
CASE = Case(tiny(tie_embeddings=True), optim=Optim(lr=1e-2, ema=EMA), clip=0, steps=3)


def of_decay(history: list[Tensor], decay: float) -> Tensor:
    """The definition: Σ d^(t−i)·w_i ÷ Σ d^(t−i)."""
    shares = [decay ** (len(history) - 1 - i) for i in range(len(history))]
    return sum((s * w for s, w in zip(shares, history)), torch.zeros_like(history[0])) / sum(shares)


def test_an_average_is_its_formula() -> None:
    """Catches an average that is not debiased, counts a step twice, follows the weights of the step before, moves on a step that is not
    finite, has another share than its half-life says, or other bytes than the dry run counts.
    """
    model = build(CASE, 1)
    optimizer = build_optimizer(model, CASE.optim, tokens=12)  # a quarter of the batch that EMA speaks of
    history: dict[str, list[Tensor]] = {w.name: [] for w in model.weights}
    step(model, optimizer, finite=False)
    assert all(not x.any() for average in CASE.optim.ema for x in optimizer.state()[average.key].values())
    for _ in range(5):
        step(model, optimizer)
        for w in model.weights:
            history[w.name].append(w.local.clone())
    before = {key: {n: x.clone() for n, x in of.items()} for key, of in optimizer.state().items()}
    step(model, optimizer, finite=False)
    state = optimizer.state()
    assert all(torch.equal(x, before[key][n]) for key, of in state.items() for n, x in of.items())
    for average, decay in zip(CASE.optim.ema, (0.5, 0.5 ** (1 / 3), 0.5 ** (1 / 8))):
        for name, x in state[average.key].items():
            torch.testing.assert_close(x, of_decay(history[name], decay), rtol=1e-12, atol=1e-14)
    held = sum(x.nbytes for of in state.values() for x in of.values())
    assert held == sum(optimizer_bytes(CASE.optim, w.placement, w.local.shape, 8) for w in model.weights)


def test_averages_of_coarse_weights_are_fine() -> None:
    """Catches an average in bf16, which stands still: its steps are smaller than the spacing of its numbers."""
    case = replace(CASE, optim=Optim(ema=0.999), precision="bf16")  # type: ignore[arg-type]
    masters = case.config.model_copy(update={"precision": case.config.precision.model_copy(update={"master": "bf16"})})
    model = draw_model(masters, 1, CPU)
    optimizer = build_optimizer(model, case.optim)
    step(model, optimizer)
    state = optimizer.state()
    assert {x.dtype for x in state["ema_0_999"].values()} == {torch.float32}
    held = sum(x.nbytes for of in state.values() for x in of.values())
    assert held == sum(optimizer_bytes(case.optim, w.placement, w.local.shape, 2) for w in model.weights)


FREE = replace(CASE, optim=Optim(name="schedule_free", lr=1e-2, decay="constant"))
LAYOUTS = {
    "tp, fsdp": Parallel(tp=2, dp_shard=2),
    "kept gathered": Parallel(dp_shard=4, reshard_after_forward=False),
    "pipeline": Parallel(pp=2, dp_shard=2),
    "hsdp, layered": Parallel(dp_replicate=2, dp_shard=2, accumulation="layered"),
    "in backward": Parallel(dp_shard=4, accumulation="layered", update_in_backward=True),
    "cp, ddp": Parallel(cp=2, dp_replicate=2, engine="ddp"),
    "offload": Parallel(dp_shard=4, offload=("optimizer",)),
}


def followed(cases: list[Case]) -> list[dict[str, Any]]:
    """For each case its averages whole, and the losses of the weights and of each average. Swapping is checked on every rank."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    found = []
    for case in cases:
        model = build(case, ranks)
        engine, mesh = build_engine(model, case.config, CPU), model.mesh
        scale = 1 / (case.batch * case.seq_len)

        def batches(number: int, case: Case = case, mesh: Any = mesh) -> list[Any]:
            numbers = sample_numbers(number * case.batch, case.batch, case.micro_batch, mesh.data_rank, mesh.data_size)
            return [fake_batch(case, row) for row in numbers]

        def loss(engine: Any = engine, mesh: Any = mesh, batches: Any = batches) -> float:
            given = batches(50)
            total = total_over_ranks(mesh, engine.evaluate(given), float(sum(b.valid for b in given)))
            return (total.loss / total.valid).item()

        for number in range(case.steps):
            update(engine, backward(engine, batches(number), scale, case.optim.lr))
        told, values = {"weights": loss()}, {}
        own = own_average(case.optim)
        for average in (*averages_of(case.optim), *([own] if own is not None else ())):
            before = [w.local.clone() for w in model.weights]
            with shown(model, engine.state(), average):
                told[average.name] = loss()
            assert all(torch.equal(w.local, x) for w, x in zip(model.weights, before))
            for w in model.weights:
                values[f"{average.name} {w.name}"] = gather_whole(engine.state()[average.keys[0]][w.name], w, mesh)
        told["weights again"] = loss()
        if mesh["pp"].size > 1:
            stages: list[dict[str, Tensor]] = [{} for _ in range(mesh["pp"].size)]
            dist.all_gather_object(stages, values, group=mesh["pp"].group)
            values = {name: x for stage in stages for name, x in stage.items()}
        found.append({"losses": told, "values": values})
    return found


def test_an_evaluation_reads_no_copy_of_other_weights() -> None:
    """Catches copies in the compute dtype that are still of the weights under the average, or of the average after it."""
    case = replace(CASE, precision="bf16")
    assert case.config.shadows
    copied, plain = followed([case, replace(case, shadows=False)])
    assert copied["losses"] == plain["losses"] and copied["losses"]["weights again"] == copied["losses"]["weights"]


@pytest.mark.dist
def test_every_layout_has_one_average() -> None:
    """Catches shards that average another rank's part, a pipeline's or a host's weights that are left out, an evaluation with weights that
    are still gathered from before the swap, or after it.
    """
    alone = followed([CASE, FREE])
    for case, number in zip(alone, (4, 2)):
        assert len({round(x, 6) for x in case["losses"].values()}) == number, "the averages must differ from the weights"
    cases = [(0, replace(CASE, parallel=p)) for p in LAYOUTS.values()]
    cases += [(1, replace(FREE, parallel=LAYOUTS[name])) for name in ("tp, fsdp", "pipeline", "in backward")]
    for found in run_ranks(4, followed, [case for _, case in cases], timeout=300):
        for (kind, case), layout in zip(cases, found):
            for key, x in layout["values"].items():
                whole = alone[kind]["values"][key]
                assert (x[tuple(slice(0, n) for n in whole.shape)] - whole).abs().max() <= 1e-12, (case.parallel, key)
            assert len(layout["values"]) == len(alone[kind]["values"])
            for key, value in alone[kind]["losses"].items():
                assert layout["losses"][key] == pytest.approx(value, rel=1e-12), (case.parallel, key)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokens(tmp_path / "tokens", 200)
    return tmp_path


def values(folder: Path, place: Path | None = None, **changes: Any) -> dict[str, Any]:
    ema = {"optim__ema": [0.8, {"half_life": 300}], "optim__decay": "constant"}
    valid = {"train__eval_every": 3, "train__eval_steps": 2, "data__valid_fraction": 0.2}
    found = settings(folder if place is None else place, **{**ema, **valid, **changes})
    return {**found, "data": {**found["data"], "train": str(folder / "tokens")}}


def stored(folder: Path, key: str, step: str = "") -> dict[str, Tensor]:
    """A kind of state in a run's checkpoint, by weight."""
    index = read_index(find(folder / "run" / "checkpoints" / step if step else folder / "run"))
    prefix = f"optim.{key}."
    return {n.removeprefix(prefix): read_slice(index, n, (0,) * len(t.shape), t.shape) for n, t in index.tensors.items() if prefix in n}


@pytest.mark.dist
def test_a_resume_goes_on_with_the_averages(folder: Path) -> None:
    """Catches averages that begin again at a resume or a change of the layout, evaluations without them, a phase with a larger batch whose
    steps count like small ones, and averages that a later config no longer has or has anew.
    """
    phases = [{"from": "4 steps", "set": {"train.global_batch_size": 8}}]
    assert run({**values(folder), "phases": phases}) == (0, "done")
    there = folder / "there"
    assert run({**values(folder, there), "phases": phases}, stop_at=2)[0] == 75
    tp = {"parallel__tp": 2, "parallel__dp_shard": 1}
    assert {code for code, _ in run_ranks(2, run, {**values(folder, there, **tp), "phases": phases})} == {0}
    assert losses(there) == pytest.approx(losses(folder), rel=1e-12)
    for key in ("ema_0_8", "ema_300_tokens", "ema_0_8" + MASS, "ema_300_tokens" + MASS):
        here, other = stored(folder, key), stored(there, key)
        assert here.keys() == other.keys() and here
        assert all((x - other[n]).abs().max() <= 1e-12 for n, x in here.items())
    shares = [0.5 ** (16 * batch / 300) for batch in (4, 4, 4, 4, 8, 8)]
    mass = 0.0
    for share in shares:
        mass = share * mass + 1 - share
    assert stored(folder, "ema_300_tokens" + MASS)["head.weight"].item() == pytest.approx(mass, rel=1e-12)
    last = rows(there)[-1]["valid_loss"]
    assert list(last) == ["tokens", "tokens ema 0.8", "tokens ema 300 tokens"]
    assert last == pytest.approx(rows(folder)[-1]["valid_loss"], rel=1e-12)
    assert all(set(row) != {"valid_loss"} for row in rows(there))
    other = {"optim__ema": [0.8, 0.25], "optim__ema_valid": False, "train__steps": 8}
    assert run({**values(folder, there, **other), "phases": phases}) == (0, "done")
    assert list(rows(there)[-1]["valid_loss"]) == ["tokens"]
    assert stored(there, "ema_0_25" + MASS)["head.weight"].item() == pytest.approx(1 - 0.25**2)
    assert stored(there, "ema_0_8" + MASS)["head.weight"].item() == pytest.approx(1 - 0.8**8)
    assert not stored(there, "ema_300_tokens")


def test_without_averages_nothing_is_kept(folder: Path) -> None:
    """Catches a run that changes with its averages: the same losses, and a checkpoint that a run without them continues."""
    assert run(values(folder)) == (0, "done")
    plain = folder / "plain"
    shutil.copytree(folder / "run" / "checkpoints" / "step-00000003", plain / "run" / "checkpoints" / "step-00000003")
    assert run(values(folder, plain, optim__ema=[])) == (0, "done")
    assert [row["loss"] for row in rows(plain)] == losses(folder)[3:]
    assert not stored(plain, "ema_0_8")


@pytest.mark.parametrize(
    ("ema", "message"),
    [
        (1.5, "decay"),
        (True, "True is no average: write a decay such as 0.999, or {half_life: 1000 steps}"),
        ({"half_life": "some"}, "'some' is no half-life: write tokens as a number, such as 1e9, or `1000 steps`"),
        ({"decay": 0.9, "half_life": 5}, "decay is 0.9 and half_life is 5: set exactly one of them"),
        ([0.9, {"decay": 0.9}], "0.9 is listed twice"),
        ("0.9 and more", "is no average"),
    ],
)
def test_bad_averages_are_sentences(ema: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message.split(" (")[0].replace("{", r"\{")):
        build_config({**settings(Path("x")), "optim": {"ema": ema}})


def test_names_and_shares() -> None:
    """Catches two spellings of one average, and half-lives in another unit."""
    assert [e.name for e in Optim(ema=(0.999, {"half_life": "1000 steps"}, {"half_life": 1e9})).ema] == [  # type: ignore[arg-type]
        "0.999", "1000 steps", "1000000000 tokens"
    ]  # fmt: skip
    assert Optim(ema=0.5) == Optim(ema={"decay": 0.5}) == Optim(ema=[{"decay": 0.5}])  # type: ignore[arg-type]
    assert Ema(half_life="2 steps").kept(7) == pytest.approx(0.5**0.5)
    assert Ema(half_life=100).kept(50) == pytest.approx(0.5**0.5)


def test_plans_and_dry_runs_count_them(folder: Path) -> None:
    """Catches a planner or a dry run without the averages, and a change of the batch in memory where their shares depend on it."""
    config = build_config(values(folder, precision__compute="fp32", parallel__dp_shard=2))
    without = config.model_copy(update={"optim": config.optim.model_copy(update={"ema": ()})})
    weights = largest_rank(config, sizes(config))["parameters"]
    for counted in (lambda c: largest_rank(c, sizes(c)), lambda c: stored_bytes(c, 2)):
        more = counted(config)["optimizer"] - counted(without)["optimizer"]
        assert 2 * weights < more < 2 * weights + 1000  # and 8 bytes for each weight
    assert largest_rank(config, sizes(config)) == stored_bytes(config, 2)
    phases = [{"from": "4 steps", "set": {"train.global_batch_size": 8}}]
    for ema, flows in ((0.9, True), ({"half_life": 300}, False)):
        found = phases_of(check(build_config({**values(folder, optim__ema=ema), "phases": phases}), 1), 1)
        assert found[0].flows is flows


def sizes(config: Config) -> dict[str, int]:
    return axis_sizes(config.parallel, 2)


def loss_of(path: Path, average: str | None = None) -> float:
    """The loss on some tokens of a checkpoint's weights, or of an average of them, as exports and generation read it."""
    opened = open_checkpoint(path, average)
    mesh = build_mesh(axis_sizes(Parallel(), 1), "cpu")
    model = load_model(opened.model, opened.seq_len, opened.source.read, mesh, Parallel(), CPU, torch.float64)
    batch = fake_batch(Case(opened.model, seq_len=16), [3, 4, 5])
    with torch.no_grad():
        return float(model.module(**batch.inputs(training=False)))


def test_averages_are_read_grow_and_begin_runs(folder: Path) -> None:
    """Catches exports and runs that take the weights instead of the average, a growth that maps an average otherwise than the weights, or
    forgets what it is a mean of, and names that no average has.
    """
    there = folder / "run"
    growth = {"step": 3, "hidden_size": 48, "num_heads": 8, "num_kv_heads": 4, "ffn_size": 64, "num_layers": 3}
    changes = {"optim__ema": [0.8, {"half_life": "2 steps"}], "checkpoint__every": 3}
    assert run({**values(folder, **changes), "grow": [growth]}) == (0, "done")
    small, grown = there / "checkpoints" / "step-00000003", there / "grown-1"
    for name in (None, "0.8", "2 steps", "2"):
        assert loss_of(grown, name) == pytest.approx(loss_of(small, name), rel=1e-9)
    assert len({loss_of(small, name) for name in (None, "0.8", "2 steps")}) == 3
    mass = {float(x) for x in stored(folder, "ema_0_8" + MASS).values()}
    assert max(mass) == pytest.approx(1 - 0.8**6)
    with pytest.raises(UsageError, match=r"--ema is 0.7, but .* keeps 0.8, 2 steps: give one of these"):
        open_checkpoint(there, "0.7")

    exported = folder / "hf"
    command("convert", small, exported, "--from", "megascale", "--to", "hf", "--ema", "0.8")
    begun = {"plain": {"init_from": str(small)}, "ours": {"init_from": str(small), "init_ema": 0.8}, "hf": {"init_from": str(exported)}}
    first = {}
    for name, checkpoint in begun.items():
        found = values(folder, folder / name, train__steps=1)
        assert run({**found, "checkpoint": checkpoint}) == (0, "done")
        first[name] = losses(folder / name)[0]
    assert first["ours"] == pytest.approx(first["hf"], rel=1e-12) and first["plain"] != pytest.approx(first["ours"], rel=1e-6)
    said = [command("generate", *model, "--tokens", "1,5,9", "--json", "--device", "cpu") for model in ((small, "--ema", 1), (exported,))]
    assert said[0] == said[1]
    with pytest.raises(UsageError, match=r"--ema is 0.8, but .* is a Hugging Face folder"):
        command("generate", exported, "--tokens", "1", "--ema", "0.8")


def command(*words: Any) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout
